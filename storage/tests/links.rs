//! A file system without hard links, as FAT and many network file systems are: a library that is loaded before all others refuses
//! them.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(target_os = "linux")]

use std::process::Command;

use potstill_storage::Root;

const CHILD: &str = "POTSTILL_TEST_WITHOUT_LINKS";
const NO_LINKS: &str = "#include <errno.h>\n\
    extern \"C\" int link(const char*, const char*) { errno = EPERM; return -1; }\n\
    extern \"C\" int linkat(int, const char*, int, const char*, int) { errno = EPERM; return -1; }\n";

#[test]
fn a_folder_without_hard_links_is_used_and_nothing_is_replaced() {
    if let Ok(folder) = std::env::var(CHILD) {
        return in_folder(&folder);
    }
    let folder = tempfile::tempdir().unwrap();
    let (source, library) = (folder.path().join("no_links.cpp"), folder.path().join("no_links.so"));
    std::fs::write(&source, NO_LINKS).unwrap();
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let compiled =
        Command::new(&compiler).args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status();
    assert!(compiled.unwrap().success(), "{compiler} failed");
    let test = "a_folder_without_hard_links_is_used_and_nothing_is_replaced";
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env("LD_PRELOAD", &library)
        .env(CHILD, folder.path().join("runs-here"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && said.contains("without links: checked"), "{said}");
}

fn in_folder(folder: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let root = Root::open(folder).unwrap();
        let linked = std::fs::hard_link("/proc/self/exe", format!("{folder}/link"));
        assert!(linked.is_err(), "hard links work here, so that this shows nothing");
        root.probe().await.unwrap();
        let run = root.run(&"demo".parse().unwrap());
        run.create("journal/1.json", "one".into()).await.unwrap();
        // A repeated request finds its own write.
        run.create("journal/1.json", "one".into()).await.unwrap();
        let error = run.create("journal/1.json", "two".into()).await.unwrap_err();
        assert!(matches!(error, potstill_storage::Error::AlreadyExists { .. }), "{error}");
        assert_eq!(run.get("journal/1.json").await.unwrap().unwrap(), "one");
        run.keep_join_key("first").await.unwrap();
        run.keep_join_key("second").await.unwrap();
        assert_eq!(run.join_key().await.unwrap().unwrap(), "first");
    });
    println!("without links: checked");
}
