//! The process environment of all commands: devices, variables, the network, a lifeline to the process that started this one, and fault
//! injection, and the count of completed work.

pub mod device;
pub mod environment;
pub mod faults;
pub mod lifeline;
pub mod network;
pub mod work;
