//! Reading training data from a folder and from a single file.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use potstill_storage::Source;

#[tokio::test]
async fn a_folder_is_listed_sorted_and_read_in_order() {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in [("b/2.png", "two"), ("a/1.png", "one"), ("top.png", "zero")] {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let path = folder.path().to_str().unwrap().to_owned();
    for location in [path.clone(), format!("file://{path}")] {
        let source = Source::open(&location).unwrap();
        let names = source.list().await.unwrap();
        assert_eq!(names, ["a/1.png", "b/2.png", "top.png"]);
        assert_eq!(source.read_all(&names).await.unwrap(), ["one", "two", "zero"]);
    }
    let file = Source::open(&format!("{path}/a/1.png")).unwrap();
    assert_eq!((file.name(), file.list().await.unwrap()), ("1.png", vec![String::new()]));
    assert_eq!(file.read("").await.unwrap(), "one");
}

#[tokio::test]
async fn what_is_not_there_is_named_and_not_created() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing");
    let error = Source::open(missing.to_str().unwrap()).unwrap_err().to_string();
    assert!(error.contains("missing"), "{error}");
    assert!(!missing.exists());
    let error = Source::open("ftp://host/data").unwrap_err().to_string();
    assert!(error.contains("ftp"), "{error}");
}
