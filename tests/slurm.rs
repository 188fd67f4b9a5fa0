//! Tests a real Slurm on this machine: the batch file is submitted, requeued during the run, resumes, and ends with the
//! weights of an undisturbed run. Skipped, with its name, where Slurm and munge are not installed.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use potstill_tests::{Cluster, binary, free_port, lacks, repository, text};

/// Longer than any step of the test.
const PATIENCE: Duration = Duration::from_secs(240);
const LOOK: Duration = Duration::from_millis(100);

fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// munged, slurmctld and slurmd, with all their files in one folder. They end when this value is dropped.
struct Slurm {
    folder: tempfile::TempDir,
    daemons: Vec<Child>,
}

impl Drop for Slurm {
    fn drop(&mut self) {
        for daemon in self.daemons.iter_mut().rev() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

impl Slurm {
    fn start(test: &str) -> Option<Self> {
        let programs = ["munged", "slurmctld", "slurmd", "sbatch", "scontrol"];
        let root = nix::unistd::Uid::effective().is_root();
        if !root || programs.iter().any(|program| on_path(program).is_none()) {
            lacks("slurm", test, "root, and Slurm (apt-get install slurm-wlm munge)");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        for name in ["state", "spool"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        let host = nix::unistd::gethostname().unwrap().into_string().unwrap();
        let key: Vec<u8> = (0..=255).collect();
        std::fs::write(at("munge.key"), key).unwrap();
        let only_ours = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(at("munge.key"), only_ours).unwrap();
        let conf = format!(
            "ClusterName=potstill\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={}\nSlurmdPort={}\nSlurmUser=root\n\
             SlurmdUser=root\nAuthType=auth/munge\nAuthInfo=socket={},cred_expire=5\nStateSaveLocation={}\n\
             SlurmdSpoolDir={}\nSlurmctldPidFile={}\nSlurmdPidFile={}\nSlurmctldLogFile={}\nSlurmdLogFile={}\n\
             ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nSelectType=select/cons_tres\n\
             SelectTypeParameters=CR_Core\nJobRequeue=1\nReturnToService=2\nKillWait=60\nMpiDefault=none\n\
             SwitchType=switch/none\nNodeName={host} NodeAddr=127.0.0.1 CPUs={} State=UNKNOWN\n\
             PartitionName=all Nodes=ALL Default=YES State=UP\n",
            free_port(),
            free_port(),
            at("munge.socket"),
            at("state"),
            at("spool"),
            at("slurmctld.pid"),
            at("slurmd.pid"),
            at("slurmctld.log"),
            at("slurmd.log"),
            std::thread::available_parallelism().unwrap(),
        );
        std::fs::write(at("slurm.conf"), conf).unwrap();
        let mut slurm = Self { folder, daemons: Vec::new() };
        let (socket, key) = (slurm.at("munge.socket"), slurm.at("munge.key"));
        let (pid, log, seed) = (slurm.at("munged.pid"), slurm.at("munged.log"), slurm.at("munge.seed"));
        slurm.daemon(
            "munged",
            &[
                "--foreground",
                "--force",
                &format!("--socket={socket}"),
                &format!("--key-file={key}"),
                &format!("--pid-file={pid}"),
                &format!("--log-file={log}"),
                &format!("--seed-file={seed}"),
            ],
        );
        slurm.until("munged", || Path::new(&socket).exists());
        slurm.daemon("slurmctld", &["-D"]);
        slurm.daemon("slurmd", &["-D"]);
        slurm.until("an idle node", || slurm.ask("sinfo", &["-h", "-o", "%T"]).contains("idle"));
        Some(slurm)
    }

    fn at(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(on_path(program).unwrap());
        command.env("SLURM_CONF", self.at("slurm.conf")).stdin(Stdio::null());
        command
    }

    fn daemon(&mut self, program: &str, arguments: &[&str]) {
        let log = std::fs::File::create(self.at(&format!("{program}.out"))).unwrap();
        let mut command = self.command(program);
        command.args(arguments).stdout(log.try_clone().unwrap()).stderr(log);
        self.daemons.push(command.spawn().unwrap());
    }

    fn ask(&self, program: &str, arguments: &[&str]) -> String {
        text(&self.command(program).args(arguments).output().unwrap().stdout)
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "another process is watched, which tells nothing by itself"
    )]
    /// Looks until something is so.
    fn until(&self, what: &str, mut so: impl FnMut() -> bool) {
        let started = Instant::now();
        while !so() {
            assert!(started.elapsed() < PATIENCE, "no {what}:\n{}", self.logs());
            std::thread::sleep(LOOK);
        }
    }

    fn logs(&self) -> String {
        let files = std::fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().path());
        let shown = files.filter(|file| file.extension().is_some_and(|e| e == "log" || e == "out"));
        shown
            .map(|f| format!("== {}\n{}", f.display(), std::fs::read_to_string(&f).unwrap_or_default()))
            .collect()
    }
}

#[test]
fn a_requeued_job_goes_on_and_ends_like_an_undisturbed_one() {
    let Some(slurm) = Slurm::start("a_requeued_job_goes_on_and_ends_like_an_undisturbed_one") else { return };
    let cluster = Cluster::default();
    let sets = ["distillation.iterations=150", "checkpoint.every=1000", "cluster.failure_timeout=5s"];
    let output = slurm.at("job.out");
    let mut submit = slurm.command("sbatch");
    submit
        .args(["--parsable", "--nodes=1", "--output", &output])
        .arg(repository().join("scripts/slurm/potstill.sbatch"))
        .arg(cluster.unscored_config())
        .arg("queued")
        .arg(cluster.storage())
        .arg("2")
        .args(sets.iter().flat_map(|set| ["--set", set]))
        .env("POTSTILL", binary("potstill"))
        .env("POTSTILL_PORT", free_port().to_string())
        .env("POTSTILL_GRACE", "50")
        .env("OMP_NUM_THREADS", "1");
    let submitted = submit.output().unwrap();
    assert!(submitted.status.success(), "{}", text(&submitted.stderr));
    let job = text(&submitted.stdout).trim().to_owned();

    let iteration = || -> Option<u64> {
        let status = cluster.about("status", "queued").arg("--json").output().unwrap();
        let status: serde_json::Value = serde_json::from_slice(&status.stdout).ok()?;
        (status["state"] == "training").then(|| status["iteration"].as_u64())?
    };
    slurm.until("training", || iteration().is_some_and(|iteration| iteration >= 10));
    let requeued = slurm.command("scontrol").args(["requeue", &job]).output().unwrap();
    assert!(requeued.status.success(), "{}", text(&requeued.stderr));
    slurm.until("end of the job", || {
        slurm.ask("scontrol", &["show", "job", &job]).contains("JobState=COMPLETED")
    });

    let log = std::fs::read_to_string(&output).unwrap();
    assert!(
        log.contains("resumed=true") && log.contains("state_from=checkpoints/"),
        "it did not resume: {log}"
    );
    assert!(log.contains("run succeeded"), "{log}");
    cluster.unscored("launch", "undisturbed", 2, &sets, &[]).output().unwrap();
    assert_eq!(cluster.checkpoint("queued", 150), cluster.checkpoint("undisturbed", 150));
    assert_eq!(cluster.summary("queued")["repeated_iterations"], 0);
}
