//! Tests which locations a root accepts, the probe, and how places are named in messages.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::sync::Arc;

use common::{Fault, Faulty, files_below, id, root_at, run};
use object_store::memory::InMemory;
use object_store::{aws::AmazonS3ConfigKey, azure::AzureConfigKey, gcp::GoogleConfigKey};
use potstill_storage::{Error, Root, Source, layout};

#[tokio::test]
async fn a_folder_and_memory_pass_the_probe_and_nothing_stays_behind() {
    let folder = tempfile::tempdir().unwrap();
    let root = root_at(&folder.path().join("made/on/demand"));
    root.probe().await.unwrap();
    root.probe().await.unwrap();
    assert_eq!(files_below(folder.path()), Vec::<std::path::PathBuf>::new());
    for url in ["memory://", "memory:///", "memory:///below/this"] {
        Root::open(url).unwrap().probe().await.unwrap();
    }
}

#[tokio::test]
async fn a_store_that_ignores_the_condition_is_refused() {
    let store = Faulty::new(Arc::new(InMemory::new()), Fault::Unconditional);
    let error = Root::in_store(store, "s3://old-store/x").probe().await.unwrap_err();
    assert!(matches!(&error, Error::NotConditional { url } if url == "s3://old-store/x"), "{error}");
    assert!(error.to_string().contains("s3://old-store/x"), "{error}");
}

#[tokio::test]
async fn a_probe_whose_answers_are_lost_passes() {
    for fault in [Fault::AnswerLost, Fault::WriteRepeated] {
        let store = Arc::new(InMemory::new());
        Root::in_store(Faulty::new(store, fault), "s3://bucket").probe().await.unwrap();
    }
}

#[tokio::test]
async fn a_store_that_cannot_be_written_is_refused() {
    for fault in [Fault::WriteFails, Fault::BucketGone] {
        let store = Faulty::new(Arc::new(InMemory::new()), fault);
        let error = Root::in_store(store, "s3://bucket").probe().await.unwrap_err();
        assert!(matches!(&error, Error::Store { operation: "write to", .. }), "{fault:?}: {error}");
        assert!(error.to_string().contains("s3://bucket/runs/"), "{error}");
    }
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let below = file.join("runs-here");
    for location in [below.display().to_string(), format!("file://{}", below.display())] {
        let error = Root::open(&location).unwrap_err();
        assert!(matches!(&error, Error::BadUrl { url, .. } if *url == location), "{error}");
        assert!(error.to_string().contains(&below.display().to_string()), "{error}");
    }
}

#[test]
fn what_names_no_store_is_refused_with_what_would() {
    let others = [
        "ftp://host/x",
        "http://host/x",
        "https://host/x",
        // Its user name is the container, which must not be removed as a credential.
        "abfss://container@account.dfs.core.windows.net/x",
        "memory://host/x",
        "file://host/x",
        "s3://",
        "://x",
    ];
    for location in others {
        let error = Root::open(location).unwrap_err();
        assert!(matches!(&error, Error::BadUrl { url, .. } if url == location), "{location}: {error}");
        for known in ["file://", "s3://", "gs://", "az://", "memory://"] {
            assert!(error.to_string().contains(known), "{error}");
        }
    }
}

#[test]
fn credentials_in_a_url_are_refused_and_not_repeated() {
    for location in [
        "s3://key:secret@bucket/x",
        "az://container/x?sv=2024&sig=secret",
        "gs://bucket/x?secret",
        "ftp://user:secret@host/x",
        "s3://key:secret@[bucket?secret",
    ] {
        for error in [Root::open(location).err().unwrap(), Source::open(location).err().unwrap()] {
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }
}

#[tokio::test]
async fn an_object_in_a_folder_lies_where_it_is_said_to_lie() {
    let folder = tempfile::tempdir().unwrap();
    let names = ["plain", "with space", "100%", "50%25", "a#b", "a?b", "ä", "a:b", "a+b&c"];
    for name in names {
        let folder = folder.path().join(name);
        let root = root_at(&folder);
        for key in ["run.toml", "samples/000000000020.png", "export/with space/100%.txt", "export/ä#?"] {
            let run = run(&root);
            run.put(key, "content".into()).await.unwrap();
            let place = run.describe(key);
            assert!(place.starts_with(folder.canonicalize().unwrap().to_str().unwrap()), "{place}");
            assert_eq!(std::fs::read_to_string(&place).unwrap(), "content", "{place}");
        }
        // Its URL names the same place.
        let again = Root::open(root.url()).unwrap();
        assert_eq!(again.url(), root.url());
        assert_eq!(run(&again).describe("run.toml"), run(&root).describe("run.toml"));
        assert_eq!(run(&again).get("run.toml").await.unwrap().unwrap(), "content");
    }
}

#[test]
fn all_ways_to_name_a_folder_lead_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display();
    let root = root_at(folder.path());
    for location in
        [format!("file://{path}"), format!("FILE://{path}"), format!("{path}/"), format!("{path}/./x/..")]
    {
        assert_eq!(Root::open(&location).unwrap().url(), root.url(), "{location}");
    }
    assert!(root.url().starts_with("file:///"), "{}", root.url());
}

#[test]
fn the_url_of_a_store_names_it_again() {
    for scheme in ["s3", "gs"] {
        let root = Root::open(&format!("{scheme}://bucket/a%20b/c")).unwrap();
        assert_eq!(root.url(), format!("{scheme}://bucket/a%20b/c"));
        let place = run(&root).describe(layout::SPECIFICATION);
        assert_eq!(place, format!("{scheme}://bucket/a%20b/c/runs/one/run.toml"));
        let again = Root::open(root.url()).unwrap();
        assert_eq!((again.url(), run(&again).describe("x")), (root.url(), run(&root).describe("x")));
    }
}

#[test]
fn the_container_of_an_azure_url_is_no_credential() {
    let variables = || {
        let pairs = [("AZURE_STORAGE_ACCOUNT_NAME", "account"), ("AZURE_STORAGE_ACCOUNT_KEY", "czNjcmV0")];
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned()))
    };
    for place in ["container", "container@account.blob.core.windows.net"] {
        let root = Root::open_with(&format!("az://{place}/a/b"), variables()).unwrap();
        assert_eq!(root.url(), format!("az://{place}/a/b"));
        assert_eq!(run(&root).describe("x"), format!("az://{place}/a/b/runs/one/x"));
        assert_eq!(Root::open_with(root.url(), variables()).unwrap().url(), root.url());
    }
    let secret = "az://container:s3cret@account.blob.core.windows.net/a";
    let error = Root::open_with(secret, variables()).unwrap_err().to_string();
    assert!(!error.contains("s3cret") && error.contains("az://container@account"), "{error}");
}

#[tokio::test]
async fn a_prefix_of_a_url_is_kept() {
    let root = Root::open("memory:///below/this").unwrap();
    let run = run(&root);
    assert_eq!(run.id(), &id());
    assert!(run.describe("a").ends_with("/below/this/runs/one/a"), "{}", run.describe("a"));
    // Clones of one value see the same objects.
    run.create(&layout::manifest_key(20), "{}".into()).await.unwrap();
    assert_eq!(root.clone().run(&id()).checkpoints().await.unwrap(), [20]);
}

#[test]
fn each_variable_that_is_documented_is_known_to_the_client() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/FORMATS.md");
    let text = std::fs::read_to_string(file).unwrap();
    let mut known = 0;
    for name in text.split('`').map(|word| word.split('=').next().unwrap()) {
        let key = name.to_ascii_lowercase();
        let is_known = match name.split_once('_') {
            // The profile's file is read here and not by the client.
            Some(("AWS", rest)) => rest == "PROFILE" || key.parse::<AmazonS3ConfigKey>().is_ok(),
            Some(("GOOGLE", _)) => key.parse::<GoogleConfigKey>().is_ok(),
            Some(("AZURE", _)) => key.parse::<AzureConfigKey>().is_ok(),
            _ => continue,
        };
        assert!(is_known, "{name}");
        known += 1;
    }
    assert!(known > 15, "{known} variables are documented");
}
