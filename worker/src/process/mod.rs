//! The process environment of all commands: devices, the network, a lifeline to the process that started this one, and fault
//! injection.

pub mod device;
pub mod faults;
pub mod lifeline;
pub mod network;
