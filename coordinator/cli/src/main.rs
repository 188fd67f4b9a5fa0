//! The program `potstill`.

mod checkpoints;
mod commands;
mod launch;
mod monitor;
mod report;
mod status;

fn main() -> std::process::ExitCode {
    commands::main()
}
