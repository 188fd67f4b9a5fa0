//! Where an invitation comes from.

use std::path::PathBuf;

use potstill_storage::{Run, layout};

use crate::{AccessError, Invitation, JoinKey, Role};

/// Finds the coordinator of a run. Asked again after a lost connection, it finds the coordinator that has taken over.
#[derive(Clone, Debug)]
pub enum Locator {
    /// An invitation that stays as it is.
    Fixed(Invitation),
    /// A file, which may be replaced.
    File(PathBuf),
    /// The run's storage, for a caller who may read the join key.
    Storage {
        /// The run's folder.
        run: Run,
        /// What the caller wants to be.
        role: Role,
        /// Another address than the one that the coordinator states, such as a forwarded port.
        address: Option<String>,
        /// Whether a coordinator without TLS and without a key will do.
        insecure: bool,
    },
}

impl Locator {
    /// The run, where its storage is known here.
    #[must_use]
    pub fn run(&self) -> Option<&Run> {
        match self {
            Self::Storage { run, .. } => Some(run),
            Self::Fixed(_) | Self::File(_) => None,
        }
    }

    /// The invitation as it is now.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub async fn find(&self) -> Result<Invitation, AccessError> {
        match self {
            Self::Fixed(invitation) => Ok(invitation.clone()),
            Self::File(path) => {
                let place = path.display().to_string();
                let text = tokio::fs::read_to_string(path)
                    .await
                    .map_err(|e| AccessError::Unusable { place: place.clone(), problem: e.to_string() })?;
                let invitation = Invitation::parse(&text, &place)?;
                match invitation.certificate {
                    Some(_) => Ok(invitation),
                    None => Err(AccessError::Insecure { address: invitation.address }),
                }
            }
            Self::Storage { run, role, address, insecure } => {
                let Some(coordinator) = run.coordinator().await? else {
                    let place = run.describe(layout::COORDINATORS);
                    return Err(AccessError::NoCoordinator { run: run.id().to_string(), place });
                };
                let run_id = run.id().to_string();
                let address = address.as_deref().unwrap_or(&coordinator.address);
                match coordinator.certificate {
                    Some(certificate) => {
                        let place = run.describe(layout::JOIN_KEY);
                        let Some(text) = run.join_key().await? else {
                            return Err(AccessError::NoKey { place });
                        };
                        let unusable =
                            || AccessError::Unusable { place, problem: "it is no join key".to_owned() };
                        let key = JoinKey::parse(&text).ok_or_else(unusable)?;
                        Ok(Invitation::new(&run_id, address, Some(certificate), Some(key.token(*role))))
                    }
                    None if *insecure => Ok(Invitation::insecure(&run_id, address)),
                    None => Err(AccessError::Insecure { address: address.to_owned() }),
                }
            }
        }
    }
}
