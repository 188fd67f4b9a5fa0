//! Messages from the wire, whatever bytes they are.

use potstill_proto::{
    PROTOCOL,
    cursor::{Cursor, Generation},
    message::{FromWorker, Hello, Place, ToWorker, WorkerId},
    wire,
};
use potstill_tests::fuzz::{MEMORY, cases, edited};
use proptest::prelude::*;
use prost::Message;

#[global_allocator]
static ALLOCATOR: cap::Cap<std::alloc::System> = cap::Cap::new(std::alloc::System, MEMORY);

fn from_workers() -> Vec<Vec<u8>> {
    let (generation, cursor) = (Generation(3), Cursor::boundary(7));
    let hello = Hello {
        protocol: PROTOCOL,
        worker: WorkerId("w".into()),
        run_id: "run".into(),
        host: "host".into(),
        pid: 7,
        device: "cuda:0".into(),
        held: Some(cursor),
        place: Some(Place { generation, rank: 1 }),
    };
    let receipt = wire::ShardReceipt {
        generation: 3,
        iteration: 7,
        rank: 1,
        key: "checkpoints/000000000007/g3/rank-001-of-002.safetensors".into(),
        bytes: 9,
        sha256: "ab".repeat(32),
        e_tag: Some("tag".into()),
    };
    let scores = wire::Scores { fid: Some(1.5), samples: 9, ..Default::default() };
    let evaluation = wire::EvaluationReport { generation: 3, iteration: 7, subject: 2, scores: Some(scores) };
    let report = wire::StepReport {
        iteration: 7,
        micro_batches: 4,
        samples: 64,
        seconds: Some(wire::StepSeconds::default()),
        discriminator_loss_sum: Some(0.5),
        ..Default::default()
    };
    let error = "collective failed: connection reset".to_owned();
    let messages: Vec<wire::WorkerMessage> = vec![
        hello.into(),
        FromWorker::Heartbeat { generation, cursor, progress: 9, activity: "training".into(), waiting: true }
            .into(),
        FromWorker::ShardReceipt(receipt).into(),
        FromWorker::StepReport(report).into(),
        wire::WorkerMessage { kind: Some(wire::worker_message::Kind::Evaluation(evaluation)) },
        FromWorker::CollectiveFailed { generation, cursor, error: error.clone() }.into(),
        FromWorker::CheckpointDamaged { generation, manifest_key: "key".into(), error: error.clone() }.into(),
        FromWorker::StateIncomplete { generation, cursor, error: error.clone() }.into(),
        FromWorker::Failed { generation, error }.into(),
    ];
    messages.iter().map(Message::encode_to_vec).collect()
}

fn to_workers() -> Vec<Vec<u8>> {
    let messages: Vec<wire::CoordinatorMessage> = vec![
        ToWorker::Welcome {
            run_id: "run".into(),
            specification: "[teacher]".into(),
            storage_url: "file:///storage".into(),
            heartbeat_millis: 100,
            joining_timeout_millis: 100,
            patience_millis: 100,
            coordinator: "c".into(),
        }
        .into(),
        ToWorker::Abandon { generation: Generation(3), reason: "reason".into() }.into(),
        ToWorker::Stop { success: true, reason: "reason".into() }.into(),
    ];
    messages.iter().map(Message::encode_to_vec).collect()
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn what_a_worker_sends_is_a_message_or_an_error(bytes in edited(from_workers())) {
        if let Ok(message) = wire::WorkerMessage::decode(&bytes[..]) {
            let _ = Hello::try_from(message.clone());
            if let Ok(message) = FromWorker::try_from(message) {
                // What is accepted can be sent on, and stays the same.
                let again = FromWorker::try_from(wire::WorkerMessage::from(message.clone()));
                prop_assert_eq!(format!("{again:?}"), format!("{:?}", Ok::<_, ()>(message)));
            }
        }
    }

    #[test]
    fn what_a_coordinator_sends_is_a_message_or_an_error(bytes in edited(to_workers())) {
        if let Ok(message) = wire::CoordinatorMessage::decode(&bytes[..]) {
            let _ = ToWorker::try_from(message);
        }
    }
}
