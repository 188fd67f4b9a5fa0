"""The Kubernetes manifests against the API's schemas, each other, and the programs that they start."""

import copy
import re
import subprocess
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MANIFESTS = ROOT / "scripts" / "kubernetes"
# The schemas are in the package: no network is needed.
VERSIONS = ["1.33", "1.37"]
# What JobSet's API accepts in these fields: the models below have its fields and their types, but take any text.
ACCEPTED = {
    "operator": {"All", "Any"},
    "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
    "onJobFailureReasons": {
        "BackoffLimitExceeded",
        "DeadlineExceeded",
        "FailedIndexes",
        "MaxFailedIndexesExceeded",
        "PodFailurePolicy",
    },
}

try:
    import kubernetes_validate
    import yaml

    # Kubeflow's trainer is built on JobSet, and its package has the models of JobSet's API.
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
except ImportError as error:
    lacking = error.name
else:
    lacking = None


def unknown(given, kept, place=""):
    """The places of a document that a model's own form of it does not have."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [
            at
            for key, value in given.items()
            for at in (unknown(value, kept[key], f"{place}.{key}") if key in kept else [f"{place}.{key}"])
        ]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [
            at for index, (one, other) in enumerate(zip(given, kept)) for at in unknown(one, other, f"{place}[{index}]")
        ]
    return [] if given == kept else [place]


@unittest.skipIf(lacking is not None, f"{lacking} is not installed (requirements-test.txt)")
class Kubernetes(unittest.TestCase):
    def setUp(self):
        texts = [path.read_text() for path in sorted(MANIFESTS.glob("*.yaml"))]
        documents = [document for text in texts for document in yaml.safe_load_all(text)]
        (self.jobset,) = (document for document in documents if document["kind"] == "JobSet")
        self.documents = [document for document in documents if document is not self.jobset]
        self.by_kind = {document["kind"]: document for document in self.documents}
        self.jobs = {job["name"]: job["template"] for job in self.jobset["spec"]["replicatedJobs"]}
        # The two ways of starting a run: the pod of its coordinator, and that of its agents.
        self.ways = {
            "Deployment and Job": [self.by_kind[kind]["spec"]["template"] for kind in ("Deployment", "Job")],
            "JobSet": [self.jobs[name]["spec"]["template"] for name in ("coordinator", "agents")],
        }

    def container(self, pod):
        (container,) = pod["spec"]["containers"]
        return container

    def options(self, pod):
        return dict(option.lstrip("-").split("=", 1) for option in self.container(pod)["args"])

    def exit_codes(self, job):
        """What a Job does by the exit codes of a container, and of which."""
        rules = [rule for rule in job["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
        codes = {code: rule["action"] for rule in rules for code in rule["onExitCodes"]["values"]}
        return codes, {rule["onExitCodes"]["containerName"] for rule in rules}

    def test_every_document_fits_its_schema(self):
        self.assertGreaterEqual(len(self.documents), 5)
        job = {"apiVersion": "batch/v1", "kind": "Job"}
        jobs = [job | {"metadata": {"name": name}} | template for name, template in self.jobs.items()]
        for document in self.documents + jobs:
            for version in VERSIONS:
                with self.subTest(kind=document["kind"], name=document["metadata"]["name"], version=version):
                    kubernetes_validate.validate(document, version, strict=True)

    def test_a_document_that_does_not_fit_is_found(self):
        document = self.by_kind["Job"]
        document["spec"]["backoffLimits"] = 3
        with self.assertRaises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(document, VERSIONS[0], strict=True)

    def test_the_jobset_fits_its_api(self):
        self.assertEqual(self.jobset["apiVersion"], "jobset.x-k8s.io/v1alpha2")

        def places(document):
            return unknown(document, JobsetV1alpha2JobSet.from_dict(document).to_dict())

        self.assertEqual(places(self.jobset), [])
        # The check itself.
        wrong = copy.deepcopy(self.jobset)
        wrong["spec"]["failurePolicy"]["rules"][0]["onExitCodes"] = [2]
        wrong["spec"]["network"]["subdomains"] = "potstill"
        self.assertEqual(places(wrong), [".spec.failurePolicy.rules[0].onExitCodes", ".spec.network.subdomains"])

    def test_the_jobset_succeeds_with_its_coordinator_and_fails_at_once_on_invalid_input(self):
        success, failure = self.jobset["spec"]["successPolicy"], self.jobset["spec"]["failurePolicy"]
        self.assertIn(success["operator"], ACCEPTED["operator"])
        self.assertEqual(success["targetReplicatedJobs"], ["coordinator"])
        self.assertGreater(failure["maxRestarts"], 0)
        for rule in failure["rules"]:
            self.assertRegex(rule["name"], r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")
            self.assertIn(rule["action"], ACCEPTED["action"])
            self.assertLessEqual(set(rule["onJobFailureReasons"]), ACCEPTED["onJobFailureReasons"])
        (rule,) = failure["rules"]
        self.assertEqual((rule["action"], rule["onJobFailureReasons"]), ("FailJobSet", ["PodFailurePolicy"]))
        self.assertNotIn("targetReplicatedJobs", rule)
        # That reason means exit code 2 only as long as no Job fails by its policy for another.
        for job in self.jobs.values():
            actions = [rule["action"] for rule in job["spec"]["podFailurePolicy"]["rules"]]
            self.assertEqual(actions.count("FailJob"), 1)

    def test_exit_codes_mean_what_the_program_says(self):
        program = ROOT / "target" / "debug" / "potstill"
        said = subprocess.run([program, "serve", "--help"], capture_output=True, text=True, check=True).stdout
        self.assertRegex(said, r"(?m)^ +2 .*not acceptable")
        self.assertRegex(said, r"(?m)^ +75 .*--resume continues")
        for job in (self.by_kind["Job"], *self.jobs.values()):
            codes, containers = self.exit_codes(job)
            self.assertEqual(codes, {75: "Ignore", 2: "FailJob"})
            self.assertEqual(containers, {self.container(job["spec"]["template"])["name"]})
            # A policy for failed pods needs pods that stay failed.
            self.assertEqual(job["spec"]["template"]["spec"]["restartPolicy"], "Never")

    def test_the_agents_find_the_coordinator(self):
        for way, (coordinator, agent) in self.ways.items():
            with self.subTest(way):
                (listened,) = self.container(coordinator)["ports"]
                self.assertEqual(self.options(coordinator)["listen"], f"0.0.0.0:{listened['containerPort']}")
                if way == "JobSet":
                    network, name = self.jobset["spec"]["network"], self.jobset["metadata"]["name"]
                    self.assertTrue(network["enableDNSHostnames"] and network["publishNotReadyAddresses"])
                    # The hostnames that JobSet documents, of the first pod of the first Job.
                    address = f"{name}-coordinator-0-0.{network.get('subdomain', name)}:{listened['containerPort']}"
                    self.assertEqual(self.jobs["coordinator"]["spec"]["completionMode"], "Indexed")
                else:
                    service = self.by_kind["Service"]
                    self.assertEqual(service["spec"]["selector"], coordinator["metadata"]["labels"])
                    (port,) = service["spec"]["ports"]
                    self.assertEqual(port["targetPort"], listened["name"])
                    address = f"{service['metadata']['name']}:{port['port']}"
                self.assertEqual(self.options(agent)["coordinator"], address)

    def test_pods_live_longer_than_their_grace_and_storage_and_run_agree(self):
        pods = [pod for way in self.ways.values() for pod in way]
        for pod in pods:
            self.assertGreater(pod["spec"]["terminationGracePeriodSeconds"], int(self.options(pod)["grace"]))
        for option in ("run-id", "storage"):
            self.assertEqual(len({self.options(pod)[option] for pod in pods}), 1)

    def test_both_ways_start_the_same_pods(self):
        for one, other in zip(*self.ways.values()):
            one, other = copy.deepcopy(one), copy.deepcopy(other)
            for pod in (one, other):
                container = self.container(pod)
                container["args"] = [option for option in container["args"] if not option.startswith("--coordinator=")]
                pod["spec"].pop("restartPolicy", None)
            self.assertEqual(one, other)

    def test_only_agents_are_let_in(self):
        policies = [document for document in self.documents if document["kind"] == "NetworkPolicy"]
        guarded = [policy["spec"]["podSelector"]["matchLabels"] for policy in policies]
        for coordinator, agent in self.ways.values():
            self.assertIn(coordinator["metadata"]["labels"], guarded)
            self.assertIn(agent["metadata"]["labels"], guarded)
            for policy in policies:
                ((source,),) = [rule["from"] for rule in policy["spec"]["ingress"]]
                self.assertEqual(source["podSelector"]["matchLabels"], agent["metadata"]["labels"])

    def test_the_run_file_is_there_whichever_way_is_taken(self):
        run = self.by_kind["ConfigMap"]
        for coordinator, _ in self.ways.values():
            volumes = {volume["name"]: volume for volume in coordinator["spec"]["volumes"]}
            mounts = {mount["name"]: mount["mountPath"] for mount in self.container(coordinator)["volumeMounts"]}
            self.assertEqual(volumes["run"]["configMap"]["name"], run["metadata"]["name"])
            (file,) = run["data"]
            self.assertEqual(self.container(coordinator)["command"][2], f"{mounts['run']}/{file}")
        # In a file of its own: whoever applies one of the two ways applies it.
        shared = [document["kind"] for document in yaml.safe_load_all((MANIFESTS / "run.yaml").read_text())]
        self.assertEqual(shared, ["ConfigMap", "NetworkPolicy", "NetworkPolicy"])

    def test_the_programs_know_these_options(self):
        program = ROOT / "target" / "debug" / "potstill"
        for way in self.ways.values():
            for pod, subcommand in zip(way, ("serve", "agent")):
                command = self.container(pod)["command"]
                self.assertEqual(command[:2], ["potstill", subcommand])
                said = subprocess.run([program, subcommand, "--help"], capture_output=True, text=True, check=True)
                known = set(re.findall(r"--[a-z-]+", said.stdout))
                used = {option.split("=")[0] for option in self.container(pod)["args"]}
                self.assertLessEqual(used, known)


if __name__ == "__main__":
    unittest.main()
