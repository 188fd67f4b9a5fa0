//! The control lane: one small all-reduce per iteration, issued early and read at its end, so that all ranks decide the
//! same at the same iteration without waiting for it.

use potstill_c10d::{Error, ProcessGroup, ReduceOp, Work};
use potstill_torch_ext::upload;
use tch::{Kind, Tensor};

/// Requests of one rank; after [`Lane::read`], those of any rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// Save at the end of this iteration.
    pub checkpoint: bool,
    /// Save at the end of this iteration and finish.
    pub stop: bool,
    /// Leave the group at the end of this iteration.
    pub yields: bool,
}

/// An exchange under way.
pub struct Lane {
    work: Work,
    flags: Tensor,
}

impl Lane {
    /// Starts the all-reduce of this rank's flags.
    ///
    /// # Errors
    /// The collective could not be issued.
    pub fn issue(group: &ProcessGroup, flags: Flags) -> Result<Self, Error> {
        let flags = Tensor::from_slice(&[flags.checkpoint, flags.stop, flags.yields].map(i64::from));
        let flags = upload(&flags, group.device());
        let work = group.all_reduce(&flags, ReduceOp::Max)?;
        Ok(Self { work, flags })
    }

    /// The flags of all ranks.
    ///
    /// # Errors
    /// The collective failed.
    pub fn read(self) -> Result<Flags, Error> {
        self.work.wait(None)?;
        let flags = self.flags.to_device(tch::Device::Cpu).to_kind(Kind::Int64);
        let raised = |index: i64| flags.int64_value(&[index]) > 0;
        Ok(Flags { checkpoint: raised(0), stop: raised(1), yields: raised(2) })
    }
}
