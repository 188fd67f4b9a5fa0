//! Keys below a run's folder. Numbers are padded with zeros, so that the order of keys is that of the numbers.

/// The specification, as the newest coordinator serves it: what decides the result is frozen with the run.
pub const SPECIFICATION: &str = "run.toml";
/// The key that lets workers and users in.
pub const JOIN_KEY: &str = "join.key";
/// SHA-256 of the teacher, where the coordinator has no copy of it: that of the first worker's copy.
pub const TEACHER: &str = "teacher.sha256";
/// The folder of the coordinators' objects.
pub const COORDINATORS: &str = "coordinators";
/// The folder of the journal.
pub const JOURNAL: &str = "journal";
/// The folder of the checkpoints.
pub const CHECKPOINTS: &str = "checkpoints";

/// Images of teacher and student at the run's end.
pub const SAMPLES: &str = "samples.png";

/// Folder of the pictures of the student.
pub const PICTURES: &str = "pictures";

/// The picture of the student after so many iterations.
#[must_use]
pub fn picture_key(iteration: u64) -> String {
    format!("{PICTURES}/{iteration:012}.png")
}

/// The iteration of a picture's key; `None` for other keys.
#[must_use]
pub fn picture_iteration(key: &str) -> Option<u64> {
    let iteration = key.strip_prefix(PICTURES)?.strip_prefix('/')?.strip_suffix(".png")?.parse().ok()?;
    (picture_key(iteration) == key).then_some(iteration)
}

/// A journal record.
#[must_use]
pub fn journal_key(sequence: u64) -> String {
    format!("{JOURNAL}/{sequence:020}.json")
}

/// The sequence number of a journal key.
#[must_use]
pub fn journal_sequence(key: &str) -> Option<u64> {
    let digits = key.strip_prefix(JOURNAL)?.strip_prefix('/')?.strip_suffix(".json")?;
    digits.parse().ok().filter(|&sequence| journal_key(sequence) == key)
}

/// The object of the coordinator whose first record is followed by record `sequence` of the journal.
#[must_use]
pub fn coordinator_key(sequence: u64) -> String {
    format!("{COORDINATORS}/{sequence:020}.json")
}

/// Whether it is the key of a coordinator's object.
#[must_use]
pub fn is_coordinator_key(key: &str) -> bool {
    let number = key.strip_prefix(COORDINATORS).and_then(|k| k.strip_prefix('/')?.strip_suffix(".json"));
    number.and_then(|digits| digits.parse().ok()).is_some_and(|sequence| coordinator_key(sequence) == key)
}

/// The folder of the journal's segments.
pub const SEGMENTS: &str = "journal-segments";
/// Records in a segment.
pub const SEGMENT: u64 = 1000;

/// A segment: the records from `index`·[`SEGMENT`] on, one on each line.
#[must_use]
pub fn segment_key(index: u64) -> String {
    format!("{SEGMENTS}/{index:012}.jsonl")
}

/// The index of a segment's key.
#[must_use]
pub fn segment_index(key: &str) -> Option<u64> {
    let digits = key.strip_prefix(SEGMENTS)?.strip_prefix('/')?.strip_suffix(".jsonl")?;
    digits.parse().ok().filter(|&index| segment_key(index) == key)
}

/// The manifest of a checkpoint.
#[must_use]
pub fn manifest_key(iteration: u64) -> String {
    format!("{CHECKPOINTS}/{iteration:012}/manifest.json")
}

/// The iteration of a manifest's key.
#[must_use]
pub fn manifest_iteration(key: &str) -> Option<u64> {
    let digits = key.strip_prefix(CHECKPOINTS)?.strip_prefix('/')?.strip_suffix("/manifest.json")?;
    digits.parse().ok().filter(|&iteration| manifest_key(iteration) == key)
}

/// The iteration of any key below the checkpoints.
#[must_use]
pub fn checkpoint_iteration(key: &str) -> Option<u64> {
    let (digits, _) = key.strip_prefix(CHECKPOINTS)?.strip_prefix('/')?.split_once('/')?;
    digits.parse().ok().filter(|iteration| format!("{iteration:012}") == digits)
}

/// The key to which the manifest of a damaged checkpoint is moved.
#[must_use]
pub fn damaged_manifest_key(iteration: u64) -> String {
    format!("{CHECKPOINTS}/{iteration:012}/damaged-manifest.json")
}

/// One rank's shard of a checkpoint. `unique` separates the attempts of different generations; the manifest names the
/// one that counts.
#[must_use]
pub fn shard_key(iteration: u64, unique: &str, rank: u32, world_size: u32) -> String {
    format!("{CHECKPOINTS}/{iteration:012}/{unique}/rank-{rank:03}-of-{world_size:03}.safetensors")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn keys_can_be_read_back_and_sort_as_they_count(a: u64, b: u64) {
            prop_assert_eq!(journal_sequence(&journal_key(a)), Some(a));
            prop_assert_eq!(journal_key(a).cmp(&journal_key(b)), a.cmp(&b));
            let (a, b) = (a % 1_000_000_000_000, b % 1_000_000_000_000);
            prop_assert_eq!(manifest_iteration(&manifest_key(a)), Some(a));
            prop_assert_eq!(manifest_key(a).cmp(&manifest_key(b)), a.cmp(&b));
        }

        #[test]
        fn a_number_has_one_key_only(digits in r"[+0]?[0-9]{11,20}") {
            let key = format!("{JOURNAL}/{digits}.json");
            prop_assert!(journal_sequence(&key).is_none_or(|sequence| journal_key(sequence) == key));
            let key = format!("{CHECKPOINTS}/{digits}/manifest.json");
            prop_assert!(manifest_iteration(&key).is_none_or(|iteration| manifest_key(iteration) == key));
        }
    }

    #[test]
    fn other_keys_are_no_manifests() {
        assert_eq!(manifest_iteration(&shard_key(7, "g1", 0, 1)), None);
        assert_eq!(manifest_iteration("checkpoints/000000000007/g1/manifest.json"), None);
        assert_eq!(manifest_iteration("checkpoints/+00000000007/manifest.json"), None);
        assert_eq!(manifest_iteration("checkpoints/0000000000007/manifest.json"), None);
        assert_eq!(manifest_iteration(&damaged_manifest_key(7)), None);
        assert_eq!(checkpoint_iteration(&shard_key(7, "g1", 0, 1)), Some(7));
        assert_eq!(checkpoint_iteration(&manifest_key(7)), Some(7));
        assert_eq!(checkpoint_iteration("checkpoints/7/x"), None);
        assert_eq!(journal_sequence("journal/7.json"), None);
        assert_eq!(journal_sequence("journal/+0000000000000000007.json"), None);
        assert_eq!(shard_key(20, "g3", 3, 8), "checkpoints/000000000020/g3/rank-003-of-008.safetensors");
    }
}
