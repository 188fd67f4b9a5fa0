//! Files of users, whatever bytes they are.

use potstill_models::weights::{Archive, archive};
use potstill_tests::fuzz::{MEMORY, cases, edited};
use proptest::prelude::*;
use safetensors::{Dtype, serialize, tensor::TensorView};
use tch::Tensor;

use super::{
    Dataset, Shape, pairs,
    prompt_file::{read_prompts, tests::parquet_file},
    read::tests::{png_of, tar},
    tars, tensors,
};

/// All tests of this program share it.
#[global_allocator]
static ALLOCATOR: cap::Cap<std::alloc::System> = cap::Cap::new(std::alloc::System, 4 * MEMORY);

const SHAPE: Shape = Shape { sample: [1, 4, 4], classes: 3 };

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn tar_files() -> Vec<Vec<u8>> {
    let picture = png_of(4, 4, |x, y| [(60 * x) as u8, (60 * y) as u8, 9]);
    let (folder, mut files) = (folder(), Vec::new());
    let path = folder.path().join("a.tar");
    let members: [&[(&str, &[u8])]; 2] = [
        &[("a/0.png", &picture), ("a/0.txt", b"a red circle"), ("a/0.cls", b"1")],
        &[("1.png", &picture), ("1.json", br#"{"label": 2, "caption": "zwei"}"#), ("2.txt", b"alone")],
    ];
    for members in members {
        tar(&path, members);
        files.push(std::fs::read(&path).unwrap());
    }
    files
}

fn image_files() -> Vec<Vec<u8>> {
    let (images, labels) = ([7u8; 2 * 16], [0u8, 2]);
    let views = [
        ("images", TensorView::new(Dtype::U8, vec![2, 1, 4, 4], &images).unwrap()),
        ("labels", TensorView::new(Dtype::U8, vec![2], &labels).unwrap()),
    ];
    let metadata = std::collections::HashMap::from([("pixel_max".to_owned(), "16".to_owned())]);
    vec![serialize(views, Some(metadata)).unwrap()]
}

fn weights() -> Vec<Vec<u8>> {
    let (a, b) = (Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0]).reshape([2, 2]), Tensor::from_slice(&[5f32]));
    let metadata = std::collections::BTreeMap::from([("family".to_owned(), "edm".to_owned())]);
    vec![archive(&[("layer.weight", &a), ("layer.bias", &b)], &metadata).unwrap()]
}

fn prompt_files() -> Vec<Vec<u8>> {
    vec![
        b"a red circle\n\nzwei blaue W\xc3\xbcrfel\r\n".to_vec(),
        br#"{"prompt": "a red circle", "label": 3}
{"prompt": "two", "label": 4}"#
            .to_vec(),
        parquet_file(),
    ]
}

proptest! {
    #![proptest_config(cases(500))]

    #[test]
    fn a_tar_is_read_or_refused(bytes in edited(tar_files())) {
        let _ = tars::read(bytes.into());
    }

    #[test]
    fn a_file_of_images_is_read_or_refused(bytes in edited(image_files())) {
        let _ = tensors::parse(&bytes);
    }

    #[test]
    fn a_file_of_weights_is_read_or_refused(bytes in edited(weights())) {
        let _ = Archive::from_bytes(&bytes);
    }

    #[test]
    fn a_file_of_prompts_is_read_or_refused(bytes in edited(prompt_files()), kind in 0..3usize) {
        let folder = folder();
        let path = folder.path().join(["prompts.txt", "prompts.jsonl", "prompts.parquet"][kind]);
        std::fs::write(&path, bytes).unwrap();
        let _ = read_prompts(path.to_str().unwrap(), "prompt");
    }

    #[test]
    fn tars_become_pairs_and_images_or_are_refused(bytes in edited(tar_files())) {
        let folder = folder();
        let path = folder.path().join("a.tar");
        std::fs::write(&path, bytes).unwrap();
        let location = path.to_str().unwrap();
        if let Ok(pairs) = pairs::load(location, None, 0) {
            for pair in &pairs {
                let _ = pair.image([4, 4]);
            }
        }
        let _ = Dataset::load(location, SHAPE);
    }
}
