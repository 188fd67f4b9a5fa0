//! How long a store operation may take, and how often it is repeated.

use std::{
    future::Future,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use backon::{ExponentialBuilder, Retryable};
use object_store::Error as StoreError;

use crate::{Error, refusals};

/// Timeout of one operation. The store's own retries, which end after three minutes, fit into it.
const PATIENCE: Duration = Duration::from_secs(300);
/// How often an operation is repeated, beyond the store's own retries, and the pause before the first time; each pause
/// is about twice the one before.
const RETRIES: usize = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Added to the timeout for each MiB that the operation moves: a slower link counts as broken.
const PATIENCE_PER_MIB: Duration = Duration::from_secs(1);

/// See [`retries`].
static REPEATED: AtomicU64 = AtomicU64::new(0);

/// Operations that this process has repeated because the store answered with an error that may pass.
#[must_use]
pub fn retries() -> u64 {
    REPEATED.load(Ordering::Relaxed)
}

/// Whether an operation with this error may succeed when it is repeated.
fn may_pass(error: &StoreError) -> bool {
    !matches!(
        error,
        StoreError::NotFound { .. }
            | StoreError::AlreadyExists { .. }
            | StoreError::Precondition { .. }
            | StoreError::NotModified { .. }
            | StoreError::InvalidPath { .. }
            | StoreError::NotSupported { .. }
            | StoreError::NotImplemented { .. }
            | StoreError::PermissionDenied { .. }
            | StoreError::Unauthenticated { .. }
            | StoreError::UnknownConfigurationKey { .. }
    )
}

/// Runs a store operation that moves `bytes`, and repeats it where that may help, within [`PATIENCE`] and the time that the
/// bytes add to it. `place` is the object's path or URL.
pub(crate) async fn asked<T, F: Future<Output = Result<T, StoreError>>>(
    operation: &'static str,
    bytes: u64,
    place: &str,
    question: impl FnMut() -> F,
) -> Result<T, Error> {
    let patience = PATIENCE + PATIENCE_PER_MIB * u32::try_from(bytes >> 20).unwrap_or(u32::MAX);
    let again =
        ExponentialBuilder::default().with_min_delay(FIRST_PAUSE).with_max_times(RETRIES).with_jitter();
    let may_pass = |error: &StoreError| may_pass(error) && refusals::advice(error, place).is_none();
    let answered = question.retry(again).when(may_pass).notify(|error, pause| {
        REPEATED.fetch_add(1, Ordering::Relaxed);
        let error = refusals::told(error, place);
        tracing::warn!(place, error, ?pause, "cannot {operation} it; trying again");
    });
    match tokio::time::timeout(patience, answered).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(source)) => Err(Error::Store { operation, place: place.to_owned(), source }),
        Err(_) => Err(Error::NoAnswer { operation, place: place.to_owned(), patience }),
    }
}
