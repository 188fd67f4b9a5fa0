//! The process environment of all commands: devices, a lifeline to the process that started this one, and fault
//! injection.

pub mod device;
pub mod faults;
pub mod lifeline;
