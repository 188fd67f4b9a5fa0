//! FID, precision and recall against values made with scipy and by brute force (`scripts/fixtures/metrics.py`).

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use potstill_distill::metrics::{Moments, precision_recall};
use potstill_models::weights::Archive;

#[test]
fn scores_agree_with_the_reference() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/scores.safetensors");
    let archive = Archive::read(&path).unwrap();
    let cases: Vec<&str> = archive.tensors.keys().filter_map(|name| name.strip_suffix(".real")).collect();
    assert_eq!(cases.len(), 3);
    for case in cases {
        let tensor = |part: &str| archive.tensors[&format!("{case}.{part}")].shallow_clone();
        let expected = Vec::<f64>::try_from(tensor("expected")).unwrap();
        let (real, generated) = (tensor("real"), tensor("generated"));
        let fid = Moments::of(&real).frechet_distance(&Moments::of(&generated));
        println!("{case}: FID {fid}, expected {}", expected[0]);
        assert!((fid - expected[0]).abs() < 1e-3 * expected[0].max(1.0), "{case}: {fid}");
        let (precision, recall) = precision_recall(&real, &generated, 3, &mut || {});
        assert_eq!([precision, recall], expected[1..], "{case}");
    }
}
