//! The process environment of all commands: devices and the cores near them, memory, variables, the network, a lifeline to the process that
//! started this one, fault injection, and the count of completed work.

pub mod cores;
pub mod device;
pub mod environment;
pub mod faults;
pub mod lifeline;
pub mod memory;
pub mod network;
pub mod work;
