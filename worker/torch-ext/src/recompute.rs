//! Recomputation (activation checkpointing, 1604.06174): a block is computed again in the backward pass instead of
//! keeping its activations.

use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::Arc;

use tch::Tensor;
use torch_sys::C_tensor;

use crate::{ffi, shim::call};

/// A part of a network: a function of tensors.
///
/// It must compute the same when it is called again, so the random numbers that it draws follow from its inputs, and it only
/// reads the tensors that it holds.
pub trait Block: Send + 'static {
    /// The function.
    fn forward(&self, inputs: &[Tensor]) -> Tensor;

    /// Called before the function; `backward`: it is computed again in the backward pass.
    fn enter(&self, _backward: bool) {}

    /// Called when the tensors that it holds are no longer needed: after the function, and in the backward pass after its
    /// gradients too.
    fn leave(&self) {}
}

/// A shared block, of which autograd can hold a reference.
#[derive(Debug)]
pub struct SharedBlock<B>(Arc<B>);

// SAFETY: what keeps a block from being `Sync` are its tensors. Their reference counts are atomic, and libtorch allows any
// number of threads to read a tensor, which is all that a `Block` does.
unsafe impl<B: Block> Send for SharedBlock<B> {}

impl<B: Block> SharedBlock<B> {
    /// Wraps a block.
    #[must_use]
    pub fn new(block: B) -> SharedBlock<B> {
        SharedBlock(Arc::new(block))
    }

    /// The block.
    pub fn get(&self) -> &B {
        &self.0
    }

    /// Computes it without recomputation.
    pub fn forward(&self, inputs: &[Tensor]) -> Tensor {
        self.0.enter(false);
        let output = self.0.forward(inputs);
        self.0.leave();
        output
    }
}

/// The block's output, of which only `inputs` are kept until its gradient is wanted; then it is computed again, under the same
/// mixed precision, and gradients flow to `inputs` and to `parameters`.
///
/// `parameters` must be all tensors besides its inputs that the block computes with and that take gradients. They are inputs of
/// one operation: a reducer sees their gradients when the whole backward pass gets to them.
///
/// The block runs again on whichever thread autograd uses for the device.
///
/// # Panics
/// When the block panics; in the backward pass its panic becomes the backward's error.
pub fn recompute<B: Block>(block: &SharedBlock<B>, inputs: &[Tensor], parameters: &[Tensor]) -> Tensor {
    let tensors: Vec<_> = inputs.iter().chain(parameters).map(Tensor::as_ptr).collect();
    let context = Arc::into_raw(Arc::clone(&block.0)).cast_mut().cast::<c_void>();
    let mut out = ptr::null_mut();
    let called = call(|error| {
        // SAFETY: `tensors` holds as many live tensors as is said. The shim owns `context` from here on and frees it with
        // `drop_block` of the same type; `SharedBlock` says why autograd's threads may call it.
        unsafe {
            ffi::potstill_recompute(
                tensors.as_ptr(),
                tensors.len(),
                inputs.len(),
                context,
                call_block::<B>,
                leave_block::<B>,
                drop_block::<B>,
                &mut out,
                error,
            )
        }
    });
    if let Err(cause) = called {
        panic!("a recomputed block failed: {cause}");
    }
    // SAFETY: the shim made this tensor for us.
    unsafe { Tensor::from_ptr(out) }
}

unsafe extern "C" fn call_block<B: Block>(
    context: *mut c_void,
    inputs: *const *mut C_tensor,
    count: usize,
    backward: bool,
) -> *mut C_tensor {
    // SAFETY: `context` is the block that `recompute` gave, and lives until `drop_block`.
    let block = unsafe { &*context.cast::<B>() };
    // SAFETY: the shim gives as many live tensors as it says; these are handles of our own.
    let inputs: Vec<Tensor> = unsafe {
        std::slice::from_raw_parts(inputs, count).iter().map(|input| Tensor::clone_from_ptr(*input)).collect()
    };
    // A panic must not unwind into C++; the panic hook has printed it already.
    let called = catch_unwind(AssertUnwindSafe(|| {
        block.enter(backward);
        let output = block.forward(&inputs);
        if !backward {
            block.leave();
        }
        output
    }));
    match called {
        // The shim frees it.
        Ok(output) => ManuallyDrop::new(output).as_mut_ptr(),
        Err(_) => ptr::null_mut(),
    }
}

unsafe extern "C" fn leave_block<B: Block>(context: *mut c_void) {
    // SAFETY: `context` is the block that `recompute` gave, and lives until `drop_block`. A panic aborts here.
    let block = unsafe { &*context.cast::<B>() };
    block.leave();
}

unsafe extern "C" fn drop_block<B: Block>(context: *mut c_void) {
    // SAFETY: `context` is the block that `recompute` gave, and this is called once.
    drop(unsafe { Arc::from_raw(context.cast::<B>().cast_const()) });
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Mutex,
            atomic::{AtomicBool, Ordering},
            mpsc,
        },
        thread,
    };

    use tch::{Device, Kind};

    use super::*;
    use crate::{Autocast, LowerPrecision};

    const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn leaf(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, OPTIONS).set_requires_grad(true)
    }

    struct TwoLayers {
        w: Tensor,
        v: Tensor,
    }

    impl Block for TwoLayers {
        fn forward(&self, inputs: &[Tensor]) -> Tensor {
            (inputs[0].matmul(&self.w).tanh() + &inputs[1]).matmul(&self.v).silu()
        }
    }

    /// The output, and the gradients of x and of both weights, with and without recomputing.
    fn gradients(again: bool, precision: Option<LowerPrecision>) -> Vec<Tensor> {
        tch::manual_seed(3);
        let (x, w, v) = (leaf(&[5, 4]), leaf(&[4, 4]), leaf(&[4, 4]));
        let constant = Tensor::randn([5, 4], OPTIONS);
        let parameters = [w.shallow_clone(), v.shallow_clone()];
        let block = SharedBlock::new(TwoLayers { w: w.shallow_clone(), v: v.shallow_clone() });
        let output = {
            let _autocast = precision.map(|precision| Autocast::enter(Device::Cpu, precision).unwrap());
            let once = |x: &Tensor| {
                let inputs = [x.shallow_clone(), constant.shallow_clone()];
                if again { recompute(&block, &inputs, &parameters) } else { block.forward(&inputs) }
            };
            // Twice, so that gradients of parameters add up.
            once(&once(&(&x * 2.0)))
        };
        drop(block);
        output.square().sum(Kind::Float).backward();
        vec![output.detach(), x.grad(), w.grad(), v.grad()]
    }

    #[test]
    fn gradients_are_those_of_the_plain_block() {
        for precision in [None, Some(LowerPrecision::BFloat16)] {
            for (kept, again) in gradients(false, precision).iter().zip(gradients(true, precision)) {
                assert_eq!(*kept, again, "{precision:?}");
            }
        }
    }

    /// As on a GPU, for which autograd has a thread of its own.
    #[test]
    fn another_thread_computes_again_with_the_weights_of_now() {
        let (x, w, v) = (leaf(&[5, 4]), leaf(&[4, 4]), leaf(&[4, 4]));
        let parameters = [w.shallow_clone(), v.shallow_clone()];
        let block = SharedBlock::new(TwoLayers { w: w.shallow_clone(), v: v.shallow_clone() });
        let (losses, received) = mpsc::channel::<Tensor>();
        let (done, waited) = mpsc::channel();
        let thread = thread::spawn(move || {
            for loss in received {
                loss.backward();
                done.send(()).unwrap();
            }
        });
        let gradients = |again: bool| {
            let inputs = [x.shallow_clone(), x.detach()];
            let output = {
                let _autocast = Autocast::enter(Device::Cpu, LowerPrecision::BFloat16).unwrap();
                if again { recompute(&block, &inputs, &parameters) } else { block.forward(&inputs) }
            };
            losses.send(output.square().sum(Kind::Float)).unwrap();
            waited.recv().unwrap();
            let found = [w.grad().copy(), v.grad().copy()];
            crate::clear_gradients(&parameters).unwrap();
            found
        };
        for _ in 0..2 {
            assert_eq!(gradients(false), gradients(true));
            tch::no_grad(|| {
                let _ = w.shallow_clone().g_add_scalar_(1.0);
            });
        }
        drop(losses);
        thread.join().unwrap();
    }

    #[test]
    fn a_block_is_left_after_its_gradients_have_been_computed() {
        struct Noted {
            weight: Tensor,
            values: Tensor,
            calls: Arc<Mutex<Vec<&'static str>>>,
        }
        impl Block for Noted {
            fn forward(&self, inputs: &[Tensor]) -> Tensor {
                &inputs[0] * &self.weight
            }
            fn enter(&self, backward: bool) {
                self.calls.lock().unwrap().push(if backward { "enter backward" } else { "enter" });
                self.weight.shallow_clone().set_data(&self.values);
            }
            fn leave(&self) {
                self.calls.lock().unwrap().push("leave");
                // Its values are gone.
                self.weight.shallow_clone().set_data(&Tensor::zeros([1], OPTIONS).expand([4], false));
            }
        }
        let calls: Arc<Mutex<Vec<_>>> = Arc::default();
        let weight = leaf(&[4]);
        let values = Tensor::full([4], 3.0, OPTIONS);
        let block =
            SharedBlock::new(Noted { weight: weight.shallow_clone(), values, calls: Arc::clone(&calls) });
        let x = leaf(&[4]);
        let output = recompute(&block, &[x.shallow_clone()], &[weight.shallow_clone()]);
        output.sum(Kind::Float).backward();
        assert_eq!(*calls.lock().unwrap(), ["enter", "leave", "enter backward", "leave"]);
        assert_eq!(x.grad(), Tensor::full([4], 3.0, OPTIONS));
        assert_eq!(weight.grad(), x.detach());
        assert_eq!(weight.stride(), [0], "no memory is held for its values");
    }

    #[test]
    fn a_panic_in_the_backward_pass_is_an_error() {
        struct FailsTheSecondTime(AtomicBool);
        impl Block for FailsTheSecondTime {
            fn forward(&self, inputs: &[Tensor]) -> Tensor {
                assert!(!self.0.swap(true, Ordering::Relaxed), "the second time it fails");
                &inputs[0] * 2.0
            }
        }
        let block = SharedBlock::new(FailsTheSecondTime(AtomicBool::new(false)));
        let output = recompute(&block, &[leaf(&[2])], &[]);
        let error = output.sum(Kind::Float).f_backward().unwrap_err().to_string();
        assert!(error.contains("a block failed"), "{error}");
    }
}
