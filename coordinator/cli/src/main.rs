//! The program `potstill`.

mod checkpoints;
mod commands;
mod launch;
mod monitor;
mod report;
mod status;
mod web;

fn main() -> std::process::ExitCode {
    commands::main()
}
