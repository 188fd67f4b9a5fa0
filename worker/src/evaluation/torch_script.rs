//! TorchScript modules from files.

use anyhow::{anyhow, bail};
use potstill_models::weights::failed_download;
use potstill_storage::digest::hexadecimal;
use sha2::{Digest, Sha256};
use tch::{CModule, Device, IValue, Kind, Tensor, no_grad};

/// SHA-256 of a file's bytes, hexadecimal.
pub fn digest_of(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

/// A TorchScript module from the bytes of its file, for evaluation: one that was saved while it was trained would go on dropping.
///
/// # Errors
/// It is not one.
pub fn torch_script(bytes: &[u8], device: Device) -> anyhow::Result<CModule> {
    if let Some(problem) = failed_download(bytes) {
        bail!(problem);
    }
    // On a GPU libtorch would compile parts of it when it is called, with a library of CUDA's that finds its own parts only where
    // Python, or the loader's path, has shown it where they are.
    tch::jit::set_tensor_expr_fuser_enabled(false);
    let mut module = CModule::load_data_on_device(&mut &bytes[..], device).map_err(|e| match message(&e) {
        // The file that only TorchScript's archives have.
        said if said.contains("constants.pkl") => anyhow!(
            "holds weights or a pickled module, not a TorchScript module: write one with torch.jit.script(module).save(…)"
        ),
        said => anyhow!("is not a TorchScript module: {said}"),
    })?;
    module.f_set_eval().map_err(|e| anyhow!("cannot be put into evaluation: {}", message(&e)))?;
    Ok(module)
}

/// Images [N, C, H, W] in [−1, 1] that differ from each other, to try a module on.
pub fn trial_images(shape: [i64; 4], device: Device) -> Tensor {
    let count: i64 = shape.iter().product();
    // Frequencies that fit into no row, so that no two images are alike.
    let x = Tensor::arange(count, (Kind::Double, device));
    ((&x * 0.37).sin() * (x * 0.0123).cos()).reshape(shape).to_kind(Kind::Float)
}

/// Batches for which modules are traced, to tell what one that refuses others was made for.
const BATCHES: [i64; 9] = [1, 2, 3, 4, 8, 16, 32, 50, 64];

/// What `run` returns for a batch of 2, if it also takes one of another size: the last batch is often smaller than the others.
///
/// # Errors
/// That of `run`, with the reason where the module takes batches of one size only.
pub fn on_any_batch<T>(run: impl Fn(i64) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let (refused, error) = match (run(2), run(3)) {
        (Ok(two), Ok(_)) => return Ok(two),
        (Ok(_), Err(error)) => (3, error),
        (Err(error), _) => (2, error),
    };
    Err(match BATCHES.into_iter().find(|batch| run(*batch).is_ok()) {
        Some(batch) => error.context(format!(
            "takes a batch of {batch}, but not one of {refused}: it was traced with a fixed batch size; write it with \
             torch.jit.script(module).save(…), or trace a forward that keeps the first dimension, such as x.flatten(1) for \
             x.view({batch}, -1)"
        )),
        None => error,
    })
}

/// How many images go through a module at a time: on the CPU few, so that each step is short.
pub fn at_a_time(device: Device) -> i64 {
    if device == Device::Cpu { 4 } else { 50 }
}

/// Types and names of the parameters of a module's `forward`, without the module itself. libtorch's Rust interface has no other way
/// to them than the message about too many arguments.
pub fn parameters(module: &CModule) -> Vec<(String, String)> {
    const TOO_MANY: usize = 64;
    let arguments: Vec<IValue> = (0..TOO_MANY).map(|_| IValue::None).collect();
    let Err(error) = no_grad(|| module.forward_is(&arguments)) else { return vec![] };
    let text = error.to_string();
    let declaration = text.split_once("Declaration: forward(").and_then(|(_, rest)| rest.split_once(") ->"));
    let Some((declaration, _)) = declaration else { return vec![] };
    let parameter = |text: &str| {
        let text = text.split('=').next().unwrap_or_default().trim();
        text.rsplit_once(' ').map(|(kind, name)| (kind.to_owned(), name.to_owned()))
    };
    declaration.split(',').skip(1).filter_map(parameter).collect()
}

const LONGEST: usize = 300;

/// What libtorch's error says: a module's own message, where one of its statements failed, or else the first line.
pub fn message(error: &tch::TchError) -> String {
    let text = error.to_string();
    let lines = || text.lines().map(str::trim).filter(|line| !line.is_empty());
    let own = lines().find(|line| {
        line.split_once(':').is_some_and(|(kind, rest)| {
            (kind.ends_with("Error") || kind.ends_with("Exception"))
                && !kind.contains(' ')
                && !rest.trim().is_empty()
        })
    });
    // Some go on with lists of everything that is registered.
    own.or_else(|| lines().next()).unwrap_or_default().chars().take(LONGEST).collect()
}
