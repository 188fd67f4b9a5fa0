//! Partitions and bad links: coordinator and workers in network namespaces of their own, joined by a bridge, with firewall
//! rules and traffic shaping between them. Each run must end like an undisturbed one. Skipped, by name, where namespaces
//! cannot be made.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use potstill_tests::{Cluster, Process, lacks, text};

const COORDINATOR: &str = "10.77.0.1";
const A: &str = "10.77.0.2";
const B: &str = "10.77.0.3";
const PORT: u16 = 7070;

/// Three hosts on one switch.
struct Net {
    name: String,
}

impl Drop for Net {
    fn drop(&mut self) {
        for host in ["hub", "c", "a", "b"] {
            let _ = run("ip", &["netns", "del", &self.host(host)]);
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    let said = || format!("{program} {}: {}", arguments.join(" "), text(&output.stderr));
    if output.status.success() { Ok(()) } else { Err(said()) }
}

impl Net {
    fn new(test: &str) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("potstill-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let net = Self { name };
        match net.build() {
            Ok(()) => Some(net),
            Err(error) => {
                lacks("namespaces", test, &format!("root, iproute2 and nftables: {error}"));
                None
            }
        }
    }

    fn build(&self) -> Result<(), String> {
        run("nft", &["--version"])?;
        let hub = self.host("hub");
        run("ip", &["netns", "add", &hub])?;
        run("ip", &["-n", &hub, "link", "add", "br0", "type", "bridge"])?;
        run("ip", &["-n", &hub, "link", "set", "br0", "up"])?;
        for (host, address) in [("c", COORDINATOR), ("a", A), ("b", B)] {
            let (own, port) = (self.host(host), format!("to-{host}"));
            run("ip", &["netns", "add", &own])?;
            run(
                "ip",
                &["link", "add", "eth0", "netns", &own, "type", "veth", "peer", "name", &port, "netns", &hub],
            )?;
            run("ip", &["-n", &hub, "link", "set", &port, "master", "br0", "up"])?;
            run("ip", &["-n", &own, "addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
            run("ip", &["-n", &own, "link", "set", "eth0", "up"])?;
            run("ip", &["-n", &own, "link", "set", "lo", "up"])?;
        }
        Ok(())
    }

    fn host(&self, host: &str) -> String {
        format!("{}-{host}", self.name)
    }

    /// A command on a host.
    fn on(&self, host: &str, command: &Command) -> Command {
        let mut wrapped = Command::new("ip");
        wrapped.args(["netns", "exec", &self.host(host)]).arg(command.get_program()).args(command.get_args());
        wrapped
    }

    /// Applies a firewall rule to what a host receives and sends.
    fn filter(&self, host: &str, rules: &[String]) {
        let hooks = ["input", "output"].map(|hook| {
            let rules = rules.join("; ");
            format!("chain {hook} {{ type filter hook {hook} priority 0; {rules}; }};")
        });
        let table = format!("add table inet potstill {{ {} }}", hooks.join(" "));
        run("ip", &["netns", "exec", &self.host(host), "nft", &table]).unwrap();
    }

    /// Cuts a host off from others, in both directions; packets are dropped silently.
    fn cut(&self, host: &str, from: &[&str]) {
        let rules: Vec<_> = from
            .iter()
            .flat_map(|other| [format!("ip saddr {other} drop"), format!("ip daddr {other} drop")])
            .collect();
        self.filter(host, &rules);
    }

    fn heal(&self, host: &str) {
        run("ip", &["netns", "exec", &self.host(host), "nft", "delete table inet potstill"]).unwrap();
    }
}

/// A run on the three hosts: at least one worker, at most two.
struct Lab {
    net: Net,
    cluster: Cluster,
    sets: Vec<String>,
    iterations: u64,
    served: Process,
    agents: [Process; 2],
}

impl Lab {
    fn start(net: Net, iterations: u64, micro_batch: u32) -> Self {
        let (cluster, sets, served) = Self::serve(&net, iterations, micro_batch);
        let agents = ["a", "b"].map(|host| Process::start(net.on(host, &cluster.agent("cut", 1))));
        let mut lab = Self { net, cluster, sets, iterations, served, agents };
        lab.served.until(&["generation opened", "world_size=2"]);
        lab.served.until(&["images/s"]);
        lab
    }

    fn serve(net: &Net, iterations: u64, micro_batch: u32) -> (Cluster, Vec<String>, Process) {
        let cluster = Cluster::default();
        let sets = vec![
            format!("distillation.iterations={iterations}"),
            format!("distillation.global_batch={}", 2 * micro_batch),
            format!("distillation.micro_batch={micro_batch}"),
            "checkpoint.every=100000".to_owned(),
            "cluster.failure_timeout=2s".to_owned(),
            "cluster.min_workers=1".to_owned(),
        ];
        let listen = format!("{COORDINATOR}:{PORT}");
        let given: Vec<&str> = sets.iter().map(String::as_str).collect();
        let serve = cluster.unscored("serve", "cut", 2, &given, &["--listen", &listen]);
        let mut served = Process::start(net.on("c", &serve));
        served.until(&["coordinator started"]);
        (cluster, sets, served)
    }

    /// Waits for the end, and compares with a run that nothing has disturbed.
    fn ends_like_an_undisturbed_run(self) -> String {
        let (code, log) = self.served.end();
        assert_eq!(code, Some(0), "{log}");
        for agent in self.agents {
            let (code, said) = agent.end();
            assert_eq!(code, Some(0), "{said}\n{log}");
        }
        let sets: Vec<&str> = self.sets.iter().map(String::as_str).collect();
        let output = self.cluster.unscored("launch", "undisturbed", 2, &sets, &[]).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        self.cluster.assert_same_end("cut", "undisturbed", self.iterations);
        drop(self.net);
        log
    }
}

#[test]
fn a_worker_cut_off_from_the_coordinator_is_named_and_joins_again() {
    let Some(net) = Net::new("a_worker_cut_off_from_the_coordinator_is_named_and_joins_again") else {
        return;
    };
    let mut lab = Lab::start(net, 350, 8);
    lab.net.cut("b", &[COORDINATOR]);
    lab.served.until(&["worker lost", "no heartbeat for 2.0 s"]);
    lab.served.until(&["generation opened", "world_size=1", "repeated=0"]);
    lab.net.heal("b");
    lab.served.until(&["generation opened", "world_size=2", "joins"]);
    lab.ends_like_an_undisturbed_run();
}

#[test]
fn a_worker_cut_off_from_all_others_is_named_and_joins_again() {
    let Some(net) = Net::new("a_worker_cut_off_from_all_others_is_named_and_joins_again") else { return };
    let mut lab = Lab::start(net, 350, 8);
    lab.net.cut("b", &[COORDINATOR, A]);
    lab.served.until(&["worker lost", "no heartbeat for 2.0 s"]);
    lab.served.until(&["generation opened", "world_size=1", "repeated=0"]);
    lab.net.heal("b");
    lab.served.until(&["generation opened", "world_size=2", "joins"]);
    lab.ends_like_an_undisturbed_run();
}

#[test]
fn workers_cut_off_from_each_other_say_so_and_go_on_when_they_meet_again() {
    let test = "workers_cut_off_from_each_other_say_so_and_go_on_when_they_meet_again";
    let Some(net) = Net::new(test) else { return };
    let mut lab = Lab::start(net, 100, 8);
    lab.net.cut("b", &[A]);
    lab.served.until(&["generation abandoned", "all ranks wait for each other"]);
    lab.served.until(&["generation opened", "generation=2", "world_size=2"]);
    lab.net.heal("b");
    lab.ends_like_an_undisturbed_run();
}

#[test]
fn a_newcomer_that_cannot_reach_the_others_is_named_and_costs_them_nothing() {
    let test = "a_newcomer_that_cannot_reach_the_others_is_named_and_costs_them_nothing";
    let Some(net) = Net::new(test) else { return };
    let iterations = 350;
    let (cluster, sets, mut served) = Lab::serve(&net, iterations, 8);
    net.cut("b", &[A]);
    let start = |host| Process::start(net.on(host, &cluster.agent("cut", 1)));
    let first = start("a");
    served.until(&["generation opened", "world_size=1"]);
    served.until(&["images/s"]);
    let second = start("b");
    // Alone, the first has not shown either that it can reach others.
    served.until(&["the next one is tried without worker"]);
    served.until(&["generation opened", "world_size=1", "repeated=0"]);
    net.heal("b");
    served.until(&["generation opened", "world_size=2"]);
    let lab = Lab { net, cluster, sets, iterations, served, agents: [first, second] };
    lab.ends_like_an_undisturbed_run();
}

#[test]
fn a_coordinator_cut_off_from_its_workers_finds_them_again() {
    let Some(net) = Net::new("a_coordinator_cut_off_from_its_workers_finds_them_again") else { return };
    let mut lab = Lab::start(net, 350, 8);
    lab.net.cut("c", &[A, B]);
    for _ in 0..2 {
        lab.served.until(&["worker lost", "no heartbeat for 2.0 s"]);
    }
    lab.net.heal("c");
    lab.served.until(&["generation opened", "state_from=rank", "repeated=0"]);
    lab.ends_like_an_undisturbed_run();
}

#[test]
fn lossy_links_cost_time_and_nothing_else() {
    let Some(net) = Net::new("lossy_links_cost_time_and_nothing_else") else { return };
    let lab = Lab::start(net, 60, 8);
    lab.net.filter("b", &["numgen random mod 100 < 5 drop".to_owned()]);
    lab.ends_like_an_undisturbed_run();
}

#[test]
fn slow_links_cost_time_and_nothing_else() {
    let Some(net) = Net::new("slow_links_cost_time_and_nothing_else") else { return };
    let lab = Lab::start(net, 30, 8);
    let shape =
        ["qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "40mbit", "burst", "64kb", "latency", "400ms"];
    let host = lab.net.host("b");
    let on_b: Vec<&str> = ["-n", &host].into_iter().chain(shape).collect();
    run("tc", &on_b).unwrap();
    let log = lab.ends_like_an_undisturbed_run();
    assert!(!log.contains("worker lost"), "{log}");
}
