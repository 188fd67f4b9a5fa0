//! Copies to a device that its queue does not have to be empty for.

use tch::{Device, Tensor};

/// The tensor on `device`. A copy from the host to a GPU goes into the device's queue: the host neither waits for it nor for what was
/// queued before, as it would with [`Tensor::to_device`], whose source may change as soon as it returns.
pub fn upload(tensor: &Tensor, device: Device) -> Tensor {
    match (tensor.device(), device) {
        // libtorch keeps page-locked memory until copies from it are done. It refuses to copy an expanded tensor to it, whose strides
        // it would take over.
        (Device::Cpu, Device::Cuda(_)) => {
            tensor.contiguous().pin_memory(device).to_device_(device, tensor.kind(), true, false)
        }
        _ => tensor.to_device(device),
    }
}
