//! The worker program's command line, as `potstill` and users call it.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::process::{Command, Output};

fn worker(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_potstill-worker")).args(arguments).output().unwrap()
}

#[test]
fn every_command_explains_itself() {
    for command in ["agent", "rank", "evaluate", "plan", "export", "sample", "check", "train-teacher"] {
        let output = worker(&[command, "--help"]);
        let help = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && help.contains("Usage"), "{command}: {help}");
    }
}

#[test]
fn what_it_does_not_know_is_refused_with_2_and_what_fails_with_1() {
    assert_eq!(worker(&["distil"]).status.code(), Some(2));
    let missing =
        worker(&["sample", "--checkpoint", "/nowhere/student.safetensors", "--out", "/tmp", "--count", "1"]);
    let message = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert_eq!(missing.status.code(), Some(1), "{message}");
    assert!(message.starts_with("error: ") && message.contains("/nowhere/student.safetensors"), "{message}");
}

#[test]
fn the_version_names_libtorch_cuda_and_nccl() {
    let said = String::from_utf8(worker(&["--version"]).stdout).unwrap();
    let values: Vec<&str> = [", libtorch ", ", CUDA ", ", NCCL "]
        .iter()
        .map(|name| said.split(name).nth(1).and_then(|rest| rest.split([',', '\n']).next()).unwrap())
        .collect();
    let number = |value: &str| value.starts_with(|first: char| first.is_ascii_digit());
    // A libtorch for the CPU alone has none of the latter two.
    assert!(number(values[0]) && values[1..].iter().all(|value| number(value) || *value == "none"), "{said}");
    assert_eq!(values[0].contains("+cu"), number(values[1]), "{said}");
}

#[test]
fn the_agents_help_says_what_a_spare_costs() {
    let help = String::from_utf8(worker(&["agent", "--help"]).stdout).unwrap();
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(help.contains("On GPUs each spare holds a device of its own"), "{help}");
}
