//! The program `potstill-worker`, which links libtorch.

fn main() -> std::process::ExitCode {
    potstill_worker::main()
}
