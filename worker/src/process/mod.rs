//! What every command of this program needs of its process: devices, log lines, error chains, a lifeline to whatever started it, and
//! faults on purpose.

pub mod chain;
pub mod device;
pub mod faults;
pub mod lifeline;
pub mod logging;
