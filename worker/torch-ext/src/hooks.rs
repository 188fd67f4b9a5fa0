//! Work on gradients during the backward pass.

use std::{ffi::c_void, ptr, ptr::NonNull};

use tch::Tensor;

use crate::{Error, ffi, shim::call};

/// Called with the index of a leaf.
type Callback = Box<dyn Fn(usize) + Send + Sync>;

/// Hooks, which are removed when this is dropped.
pub struct GradientHooks {
    raw: NonNull<ffi::Hooks>,
    /// What they call.
    _callback: Box<Callback>,
}

impl Drop for GradientHooks {
    fn drop(&mut self) {
        // SAFETY: the pointer came from the shim, is owned here, and is used no more. The callback is dropped after it.
        unsafe { ffi::potstill_hooks_free(self.raw.as_ptr()) }
    }
}

/// Calls `then` with the index of a leaf in every backward pass that reaches it, once its gradient is complete and in place, on
/// autograd's thread. The gradient may be taken away there. No backward pass may run while the hooks are made or dropped.
///
/// # Errors
/// A tensor takes no gradient.
pub fn on_gradients(
    leaves: &[Tensor],
    then: impl Fn(usize) + Send + Sync + 'static,
) -> Result<GradientHooks, Error> {
    let callback: Box<Callback> = Box::new(Box::new(then));
    let pointers: Vec<_> = leaves.iter().map(Tensor::as_ptr).collect();
    let mut raw = ptr::null_mut();
    let failed = |cause| Error { operation: "hook gradients", cause };
    call(|error| {
        let context = ptr::from_ref::<Callback>(&callback).cast::<c_void>();
        // SAFETY: `pointers` holds as many live tensors as is said. The callback lives as long as the hooks, at an address
        // that does not change.
        unsafe {
            let leaves = pointers.as_ptr();
            ffi::potstill_on_gradients(leaves, pointers.len(), context, notify, &mut raw, error)
        }
    })
    .map_err(failed)?;
    let raw = NonNull::new(raw).ok_or_else(|| failed("no hooks".to_owned()))?;
    Ok(GradientHooks { raw, _callback: callback })
}

unsafe extern "C" fn notify(context: *const c_void, leaf: usize) {
    // SAFETY: `context` is the callback that `on_gradients` gave, which the hooks do not outlive. A panic aborts here.
    let callback = unsafe { &*context.cast::<Callback>() };
    callback(leaf);
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tch::{Device, Kind, no_grad};

    use super::*;

    #[test]
    fn each_leaf_is_told_of_once_in_a_backward_pass_when_its_gradient_is_whole() {
        let leaf = |value: f32| Tensor::from_slice(&[value]).set_requires_grad(true);
        let (a, b) = (leaf(2.0), leaf(3.0));
        let leaves = [a.shallow_clone(), b.shallow_clone()];
        let seen: Arc<Mutex<Vec<(usize, f64)>>> = Arc::default();
        let (noted, watched) = (Arc::clone(&seen), Mutex::new(leaves.map(|leaf| leaf.shallow_clone())));
        let hooks = on_gradients(&[a.shallow_clone(), b.shallow_clone()], move |index| {
            let gradient = watched.lock().unwrap()[index].grad().double_value(&[0]);
            noted.lock().unwrap().push((index, gradient));
        })
        .unwrap();
        // `a` is used twice.
        (&a * &b + &a * 5.0).backward();
        let mut told = std::mem::take(&mut *seen.lock().unwrap());
        told.sort_by_key(|(index, _)| *index);
        assert_eq!(told, [(0, 8.0), (1, 2.0)]);
        drop(hooks);
        (&a * &b).backward();
        assert!(seen.lock().unwrap().is_empty());
        let constant = no_grad(|| Tensor::ones([1], (Kind::Float, Device::Cpu)));
        assert!(on_gradients(&[constant], |_| {}).is_err());
    }
}
