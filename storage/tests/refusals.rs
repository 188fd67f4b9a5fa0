//! Stores that refuse: asked once, and told in one line with what to do; and credentials from AWS's shared files.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    sync::mpsc,
};

use object_store::{aws::AmazonS3ConfigKey, azure::AzureConfigKey, gcp::GoogleConfigKey};
use potstill_storage::Root;

/// A server that answers all requests alike; returns its address, and the headers of each request.
fn server(answer: &str) -> (String, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, answer) = (listener.local_addr().unwrap(), answer.to_owned());
    let (tell, asked) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut reader = BufReader::new(stream.unwrap());
            let (mut head, mut length) = (String::new(), 0);
            loop {
                let start = head.len();
                if reader.read_line(&mut head).unwrap_or(0) <= 2 {
                    break;
                }
                let line = head[start..].to_lowercase();
                if let Some(value) = line.strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
            }
            let _ = reader.read_exact(&mut vec![0; length]);
            let _ = tell.send(head);
            let _ = reader.into_inner().write_all(answer.as_bytes());
        }
    });
    (format!("http://{address}"), asked)
}

fn said(status: &str, code: &str, message: &str) -> String {
    let body =
        format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>{message}</Message></Error>");
    format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

fn variables(address: &str, more: &[(&str, &str)]) -> Vec<(String, String)> {
    let given = [("AWS_ENDPOINT", address), ("AWS_ALLOW_HTTP", "true")];
    given.iter().chain(more).map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

const KEYS: [(&str, &str); 3] =
    [("AWS_ACCESS_KEY_ID", "A"), ("AWS_SECRET_ACCESS_KEY", "a"), ("AWS_REGION", "us-east-1")];

#[tokio::test]
async fn a_refusal_is_met_once_and_says_what_to_do() {
    for (status, code, message, part) in [
        ("403 Forbidden", "AccessDenied", "Access Denied", "reads, writes, lists and deletes"),
        ("403 Forbidden", "SignatureDoesNotMatch", "It differs.", "AWS_ACCESS_KEY_ID"),
        ("403 Forbidden", "RequestTimeTooSkewed", "Too large.", "clock"),
        ("400 Bad Request", "ExpiredToken", "It has expired.", "get new ones"),
        ("400 Bad Request", "AuthorizationHeaderMalformed", "expecting 'eu-central-1'", "AWS_REGION"),
        ("301 Moved", "PermanentRedirect", "Another endpoint.", "AWS_REGION"),
        ("404 Not Found", "NoSuchBucket", "None.", "no such bucket"),
    ] {
        let (address, asked) = server(&said(status, code, message));
        let root = Root::open_with("s3://bucket/p", variables(&address, &KEYS)).unwrap();
        let error = root.probe().await.unwrap_err().to_string();
        assert!(error.contains(part) && !error.contains("<Code>"), "{code}: {error}");
        assert!(error.lines().count() == 1 && error.len() < 600, "{code}: {error}");
        // The write, and the removal of what it may have written.
        assert!(asked.try_iter().count() <= 2, "{code} is asked again");
    }
}

#[test]
fn settings_that_cannot_be_sent_are_named_and_empty_ones_are_none() {
    for (more, part) in [
        (&[("AWS_ENDPOINT", "minio:9000")][..], "https://"),
        (&[("AWS_SESSION_TOKEN", "a\nb")], "AWS_SESSION_TOKEN"),
    ] {
        let given = variables("http://127.0.0.1:1", &[&KEYS[..], more].concat());
        let error = Root::open_with("s3://bucket/p", given).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let given = [("AWS_ENDPOINT", ""), ("AWS_SESSION_TOKEN", "t\n"), ("AWS_ALLOW_HTTP", "")];
    let given = variables("http://127.0.0.1:1", &[&KEYS[..], &given].concat());
    assert!(Root::open_with("s3://bucket/p", given).is_ok());
    for (location, part) in [
        ("s3:/bucket/x", "two slashes"),
        ("~/runs", "~"),
        ("s3://minio:9000/bucket", "no port"),
        ("s3://KEY@bucket/x", "environment"),
        ("s3://bucket/x#y", "#"),
    ] {
        let error = Root::open_with(location, []).unwrap_err().to_string();
        assert!(error.contains(part), "{location}: {error}");
    }
}

/// Those that docs/FORMATS.md names, beside AWS_PROFILE, which is read here.
#[test]
fn the_variables_that_are_named_are_those_of_the_clients() {
    let document = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/FORMATS.md");
    let text = std::fs::read_to_string(document).unwrap();
    let stores = text.split("## Stores").nth(1).unwrap().split("\n## ").next().unwrap();
    let names = stores.split('`').filter(|name| {
        let name = name.split('=').next().unwrap();
        name.contains('_') && name.chars().all(|c| c.is_ascii_uppercase() || c == '_')
    });
    let mut checked = 0;
    for name in names.map(|name| name.split('=').next().unwrap()).filter(|name| *name != "AWS_PROFILE") {
        let key = name.to_lowercase();
        let known = match name.split('_').next().unwrap() {
            "AWS" => key.parse::<AmazonS3ConfigKey>().is_ok(),
            "GOOGLE" => key.parse::<GoogleConfigKey>().is_ok(),
            _ => key.parse::<AzureConfigKey>().is_ok(),
        };
        assert!(known, "{name}");
        checked += 1;
    }
    assert!(checked > 12, "{checked}");
}

#[tokio::test]
async fn keys_of_a_profile_are_used() {
    let home = tempfile::tempdir().unwrap();
    std::fs::create_dir(home.path().join(".aws")).unwrap();
    let profile = "[lab]\naws_access_key_id = LABKEY\naws_secret_access_key = x\nregion = eu-west-9\n";
    std::fs::write(home.path().join(".aws/credentials"), profile).unwrap();
    let (address, asked) = server(&said("403 Forbidden", "AccessDenied", "No."));
    let place = home.path().display().to_string();
    let given = variables(&address, &[("HOME", &place), ("AWS_PROFILE", "lab")]);
    let root = Root::open_with("s3://bucket/p", given).unwrap();
    assert!(root.probe().await.is_err());
    let head = asked.recv().unwrap();
    assert!(head.contains("LABKEY/") && head.contains("/eu-west-9/s3/"), "{head}");
    let given = variables(&address, &[("HOME", &place), ("AWS_PROFILE", "office")]);
    let error = Root::open_with("s3://bucket/p", given).unwrap_err().to_string();
    assert!(error.contains("office"), "{error}");
}
