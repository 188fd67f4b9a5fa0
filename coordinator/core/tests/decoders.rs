//! Records of a journal, whatever bytes they are.

use potstill_core::{observation::Outcome, record::Record};
use potstill_proto::{cursor::Generation, message::Source};
use potstill_tests::fuzz::{MEMORY, cases, edited};
use proptest::prelude::*;

#[global_allocator]
static ALLOCATOR: cap::Cap<std::alloc::System> = cap::Cap::new(std::alloc::System, MEMORY);

fn records() -> Vec<Vec<u8>> {
    let opened = Record::GenerationOpened {
        generation: Generation(2),
        members: vec!["w0".into(), "w1".into()],
        source: Source::Checkpoint { manifest_key: "checkpoints/000000000020/manifest.json".into() },
        start: 20,
        repeats: 1,
        reason: "worker lost".into(),
    };
    let started = Record::RunStarted {
        coordinator: "c".into(),
        run_id: "run".into(),
        address: "10.0.0.1:7070".into(),
        certificate: Some("ab".into()),
    };
    let ended = Record::Ended { outcome: Outcome::Succeeded { iteration: 20 } };
    let committed = Record::Committed { iteration: 20, manifest_key: "key".into() };
    let encoded = [opened, started, ended, committed].map(|record| record.encode());
    encoded.into_iter().map(|bytes| bytes.expect("a record can be written")).collect()
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn a_record_is_read_or_refused(bytes in edited(records())) {
        if let Ok(record) = Record::decode(&bytes) {
            let again = Record::decode(&record.encode().expect("it was read"));
            prop_assert_eq!(format!("{again:?}"), format!("{:?}", Ok::<_, ()>(record)));
        }
    }
}
