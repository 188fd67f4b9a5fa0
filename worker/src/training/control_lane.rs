//! The control lane: one tiny all-reduce per iteration, issued early and read at its end, so that all ranks decide the
//! same at the same iteration and nobody waits for it.

use potstill_c10d::{Error, ProcessGroup, ReduceOp, Work};
use tch::{Kind, Tensor};

/// What some rank wants; after [`Lane::read`], what any rank wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// Save at the end of this iteration.
    pub checkpoint: bool,
    /// Save at the end of this iteration and leave.
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
    /// Puts this rank's flags on the lane.
    ///
    /// # Errors
    /// The collective could not be issued.
    pub fn issue(group: &ProcessGroup, flags: Flags) -> Result<Self, Error> {
        let flags = Tensor::from_slice(&[flags.checkpoint, flags.stop, flags.yields].map(i64::from))
            .to_device(group.device());
        let work = group.all_reduce(&flags, ReduceOp::Max)?;
        Ok(Self { work, flags })
    }

    /// Everybody's flags.
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
