"""The Kubernetes manifests against the API's schemas, each other, and the programs that they start."""

import re
import subprocess
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MANIFESTS = ROOT / "scripts" / "kubernetes"
# The schemas are in the package: no network is needed.
VERSIONS = ["1.33", "1.37"]

try:
    import kubernetes_validate
    import yaml
except ImportError:
    kubernetes_validate = None


@unittest.skipIf(kubernetes_validate is None, "kubernetes-validate is not installed (requirements-test.txt)")
class Kubernetes(unittest.TestCase):
    def setUp(self):
        texts = [path.read_text() for path in sorted(MANIFESTS.glob("*.yaml"))]
        self.documents = [document for text in texts for document in yaml.safe_load_all(text)]
        self.by_kind = {document["kind"]: document for document in self.documents}

    def pod(self, kind):
        return self.by_kind[kind]["spec"]["template"]

    def container(self, kind):
        (container,) = self.pod(kind)["spec"]["containers"]
        return container

    def test_every_document_fits_its_schema(self):
        self.assertGreaterEqual(len(self.documents), 5)
        for document in self.documents:
            for version in VERSIONS:
                with self.subTest(kind=document["kind"], version=version):
                    kubernetes_validate.validate(document, version, strict=True)

    def test_a_document_that_does_not_fit_is_found(self):
        document = self.by_kind["Job"]
        document["spec"]["backoffLimits"] = 3
        with self.assertRaises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(document, VERSIONS[0], strict=True)

    def test_the_agents_find_the_coordinator(self):
        service = self.by_kind["Service"]
        labels = self.pod("Deployment")["metadata"]["labels"]
        self.assertEqual(service["spec"]["selector"], labels)
        (port,) = service["spec"]["ports"]
        (listened,) = self.container("Deployment")["ports"]
        self.assertEqual(port["targetPort"], listened["name"])
        self.assertIn(f"--listen=0.0.0.0:{listened['containerPort']}", self.container("Deployment")["args"])
        address = f"--coordinator={service['metadata']['name']}:{port['port']}"
        self.assertIn(address, self.container("Job")["args"])

    def test_pods_live_longer_than_their_grace_and_storage_and_run_agree(self):
        runs, storages = set(), set()
        for kind in ("Deployment", "Job"):
            options = dict(option.lstrip("-").split("=", 1) for option in self.container(kind)["args"])
            self.assertGreater(self.pod(kind)["spec"]["terminationGracePeriodSeconds"], int(options["grace"]))
            runs.add(options["run-id"])
            storages.add(options["storage"])
        self.assertEqual((len(runs), len(storages)), (1, 1))

    def test_only_agents_are_let_in(self):
        policies = [document for document in self.documents if document["kind"] == "NetworkPolicy"]
        guarded = [policy["spec"]["podSelector"]["matchLabels"] for policy in policies]
        for kind in ("Deployment", "Job"):
            self.assertIn(self.pod(kind)["metadata"]["labels"], guarded)
        for policy in policies:
            ((source,),) = [rule["from"] for rule in policy["spec"]["ingress"]]
            self.assertEqual(source["podSelector"]["matchLabels"], self.pod("Job")["metadata"]["labels"])

    def test_the_programs_know_these_options(self):
        for kind, subcommand in (("Deployment", "serve"), ("Job", "agent")):
            command = self.container(kind)["command"]
            self.assertEqual(command[:2], ["potstill", subcommand])
            program = ROOT / "target" / "debug" / "potstill"
            said = subprocess.run([program, subcommand, "--help"], capture_output=True, text=True, check=True)
            known = set(re.findall(r"--[a-z-]+", said.stdout))
            used = {option.split("=")[0] for option in self.container(kind)["args"]}
            self.assertLessEqual(used, known)


if __name__ == "__main__":
    unittest.main()
