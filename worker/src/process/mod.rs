//! What every command of this program needs of its process: devices, a lifeline to the process that started it, and
//! faults on purpose.

pub mod device;
pub mod faults;
pub mod lifeline;
