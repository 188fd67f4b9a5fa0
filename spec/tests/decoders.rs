//! Specifications, whatever text they are.

use std::path::Path;

use potstill_spec::RunSpec;
use potstill_tests::fuzz::{MEMORY, cases, edited_text};
use proptest::prelude::*;

#[global_allocator]
static ALLOCATOR: cap::Cap<std::alloc::System> = cap::Cap::new(std::alloc::System, MEMORY);

fn run_files() -> Vec<Vec<u8>> {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    let files = ["digits/four-step-gan.toml", "sdxl/base.toml", "shapes/four-step.toml"];
    files.iter().map(|file| std::fs::read(configs.join(file)).expect("a run file")).collect()
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn a_specification_is_read_or_refused(text in edited_text(run_files())) {
        if let Ok(spec) = RunSpec::from_toml(&text) {
            let written = spec.to_toml();
            // Values that no specification may have are read too, and refused by `validate`.
            if spec.validate().is_ok() {
                let again = RunSpec::from_toml(&written.expect("it is valid")).expect("it was written");
                prop_assert_eq!(spec.differences(&again), Vec::<String>::new());
            }
        }
    }
}
