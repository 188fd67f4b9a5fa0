//! `potstill report` on hand-made run folders: the reports, the exit codes, and how a real browser shows them.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    path::Path,
    process::{Command, Output},
};

use image::{Rgb, RgbImage};
use potstill_spec::RunSpec;
use potstill_tests::{browser, lacks};

const SUMMARY: &str = r#"{"run": "demo", "world_size": 2, "iterations": 20, "images": 2560, "images_per_second": 900.0,
    "wall_seconds": 194.0,
    "teacher": {"fid": 0.2, "agreement": 0.99, "precision": 0.91, "recall": 0.9, "diversity": 5.8,
                "evaluations_per_image": 35.0, "images_per_second": 100.0},
    "student": {"fid": 0.3, "agreement": 0.98, "precision": 0.93, "recall": 0.85, "diversity": null,
                "evaluations_per_image": 1.0, "images_per_second": 3500.0},
    "initial": {"fid": 9.0, "agreement": 0.5}}"#;
const EVALUATION: &str = r#"{"kind": "evaluation", "subject": "student", "iteration": 20, "images": 2560,
    "scores": {"fid": 0.3, "agreement": 0.98, "precision": 0.93, "recall": 0.85, "diversity": null,
               "evaluations_per_image": 1.0, "images_per_second": 3500.0, "samples": 2000}, "wall_seconds": 194.0}"#;
/// Text in a file, which must be shown and not executed.
const HOSTILE: &str = "teacher</code><script>document.title='obeyed'</script>.safetensors";

/// A storage with a run called demo.
fn storage(finished: bool) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("runs/demo");
    std::fs::create_dir_all(&run).unwrap();
    let mut spec = RunSpec::default();
    spec.teacher.weights = Some(HOSTILE.into());
    std::fs::write(run.join("run.toml"), spec.to_toml().unwrap()).unwrap();
    std::fs::write(run.join("metrics.jsonl"), EVALUATION.replace('\n', " ") + "\n").unwrap();
    if finished {
        std::fs::write(run.join("summary.json"), SUMMARY).unwrap();
    }
    RgbImage::from_pixel(400, 200, Rgb([250, 0, 250])).save(run.join("samples.png")).unwrap();
    RgbImage::from_pixel(400, 200, Rgb([0, 250, 250])).save(run.join("curves.png")).unwrap();
    folder
}

fn report(storage: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_potstill"))
        .args(["report", "demo", "--storage"])
        .arg(storage)
        .args(arguments)
        .output()
        .unwrap()
}

fn page(storage: &Path, name: &str) -> String {
    std::fs::read_to_string(storage.join("runs/demo").join(name)).unwrap()
}

#[test]
fn both_pages_set_teacher_and_student_side_by_side() {
    let storage = storage(true);
    let output = report(storage.path(), &["--price-per-device-hour", "1.8"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("report.html") && said.contains("report.md"), "{said}");
    for name in ["report.html", "report.md"] {
        let page = page(storage.path(), name);
        // FID and its ratio, agreement, seconds per 1,000 images (10 and 0.286), and their price on two devices.
        for part in
            ["0.200", "0.300", "1.50×", "98.0 %", "0.286", "0.0100 EUR", "3 min 14 s", "No thresholds", "–"]
        {
            assert!(page.contains(part), "{part} is not in {name}: {page}");
        }
        assert!(!page.contains("not finished"), "{name}");
    }
    let html = page(storage.path(), "report.html");
    assert!(!html.contains("<script") && !html.contains("http://") && !html.contains("https://"));
    assert_eq!(html.matches("data:image/png;base64,").count(), 2);
    assert!(page(storage.path(), "report.md").contains("(samples.png)"));

    let elsewhere = tempfile::tempdir().unwrap();
    let out = elsewhere.path().join("new");
    assert_eq!(report(storage.path(), &["--out", out.to_str().unwrap()]).status.code(), Some(0));
    let markdown = std::fs::read_to_string(out.join("report.md")).unwrap();
    assert!(!markdown.contains("(samples.png)"), "the picture does not lie there");
    assert!(markdown.contains("No price per device-hour was given"));
}

#[test]
fn thresholds_set_the_exit_code() {
    let storage = storage(true);
    let code = |arguments: &[&str]| {
        let output = report(storage.path(), arguments);
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    assert_eq!(code(&["--require", "student.fid<=1.5*teacher.fid", "--require", "student.recall>=0.8"]).0, 0);
    let (missed, said) = code(&["--require", "student.fid<=0.25", "--require", "student.recall>=0.8"]);
    assert_eq!(missed, 3);
    assert!(said.contains("student.fid <= 0.25") && said.contains("0.3000"), "{said}");
    assert!(page(storage.path(), "report.html").contains("1 of 2 thresholds failed"));
    let (missed, said) = code(&["--require", "student.diversity>=1"]);
    assert!(missed == 3 && said.contains("student.diversity was not measured"), "{said}");
    let (bad, said) = code(&["--require", "student.fud<=1"]);
    assert!(bad == 2 && said.contains("student.fid"), "{said}");
    assert_eq!(code(&["--price-per-device-hour", "-1"]).0, 2);
}

#[test]
fn a_clip_score_is_shown_and_required_where_there_is_one() {
    let storage = storage(true);
    let run = storage.path().join("runs/demo");
    let required = ["--require", "student.clip_score>=0.95*teacher.clip_score"];
    let output = report(storage.path(), &required);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(3) && said.contains("clip_score was not measured"), "{said}");
    for name in ["report.html", "report.md"] {
        assert!(!page(storage.path(), name).contains("CLIP score"), "{name}");
    }
    let with = |text: &str, clip_score: &str| {
        text.replace("\"diversity\":", &format!("\"clip_score\": {clip_score}, \"diversity\":"))
    };
    std::fs::write(run.join("summary.json"), with(SUMMARY, "31.416")).unwrap();
    std::fs::write(run.join("metrics.jsonl"), with(EVALUATION, "27.182").replace('\n', " ") + "\n").unwrap();
    assert_eq!(report(storage.path(), &required).status.code(), Some(0));
    for name in ["report.html", "report.md"] {
        let page = page(storage.path(), name);
        assert_eq!(page.matches("CLIP score").count(), 2, "{name}: {page}");
        assert!(page.contains("31.42") && page.contains("27.18"), "{name}: {page}");
    }
}

#[test]
fn a_run_that_is_not_finished_says_so_and_one_that_is_not_there_is_an_error() {
    let storage = storage(false);
    assert_eq!(report(storage.path(), &[]).status.code(), Some(0));
    let page = page(storage.path(), "report.html");
    assert!(page.contains("not finished") && page.contains("0.300"), "its last scores are shown");
    let empty = tempfile::tempdir().unwrap();
    let output = report(empty.path(), &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no run demo"));
}

#[test]
fn a_real_browser_shows_tables_and_pictures_and_obeys_no_file() {
    let Some(browser) = browser() else {
        let test = "a_real_browser_shows_tables_and_pictures_and_obeys_no_file";
        return lacks("chromium", test, "no Chromium on PATH");
    };
    let storage = storage(true);
    assert!(report(storage.path(), &[]).status.success());
    let page = storage.path().join("runs/demo/report.html");
    let profile = tempfile::tempdir().unwrap();
    let picture = storage.path().join("page.png");
    let shown = Command::new(browser)
        .args([
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--window-size=1000,3000",
        ])
        // A request to the network would fail and be visible.
        .arg("--proxy-server=127.0.0.1:9")
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("--screenshot={}", picture.display()))
        .arg("--dump-dom")
        .arg(format!("file://{}", page.display()))
        .output()
        .unwrap();
    assert!(shown.status.success(), "{}", String::from_utf8_lossy(&shown.stderr));
    let dom = String::from_utf8_lossy(&shown.stdout);
    if !dom.is_empty() {
        assert!(dom.contains("<title>Teacher and student: demo</title>"), "a file was obeyed: {dom}");
    }
    let pixels = image::open(&picture).unwrap().to_rgb8();
    let count = |colour: [u8; 3]| pixels.pixels().filter(|p| p.0 == colour).count();
    // Each picture has 80,000 pixels, of which none is scaled away at this width.
    assert!(count([250, 0, 250]) > 60_000, "samples.png is not shown");
    assert!(count([0, 250, 250]) > 60_000, "curves.png is not shown");
    let ink = pixels.pixels().filter(|p| p.0.iter().all(|c| *c < 90)).count();
    assert!(ink > 2000, "there is hardly any text: {ink} dark pixels");
}
