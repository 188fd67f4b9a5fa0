//! `potstill-worker`: the half of Potstill that links libtorch.

fn main() -> std::process::ExitCode {
    potstill_worker::main()
}
