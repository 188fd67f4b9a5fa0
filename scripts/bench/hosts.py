"""Hosts of a simulated network: network namespaces joined by a bridge, where there are rights; otherwise this machine alone."""

from __future__ import annotations

import os
import shutil
import subprocess

PREFIX = "10.78.0."


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Hosts:
    """Named hosts, each with an address, which can be cut off from each other."""

    def __init__(self, names: list[str]):
        self.addresses = {name: f"{PREFIX}{number}" for number, name in enumerate(names, 1)}
        self.name = f"potstill-chaos-{os.getpid()}"
        self.made: list[str] = []
        self.separate = os.geteuid() == 0 and shutil.which("nft") is not None and self.build()
        if not self.separate:
            self.remove()

    def build(self) -> bool:
        try:
            hub = self.host("hub")
            ip("netns", "add", hub)
            self.made.append(hub)
            ip("-n", hub, "link", "add", "br0", "type", "bridge")
            ip("-n", hub, "link", "set", "br0", "up")
            for name, address in self.addresses.items():
                own, port = self.host(name), f"to-{name}"
                ip("netns", "add", own)
                self.made.append(own)
                ip("link", "add", "eth0", "netns", own, "type", "veth", "peer", "name", port, "netns", hub)
                ip("-n", hub, "link", "set", port, "master", "br0", "up")
                ip("-n", own, "addr", "add", f"{address}/24", "dev", "eth0")
                ip("-n", own, "link", "set", "eth0", "up")
                ip("-n", own, "link", "set", "lo", "up")
        except subprocess.CalledProcessError:
            return False
        return True

    def host(self, name: str) -> str:
        return f"{self.name}-{name}"

    def address(self, name: str) -> str:
        return self.addresses[name] if self.separate else "127.0.0.1"

    def on(self, name: str, command: list[str]) -> list[str]:
        """The command on a host, whose name is its own."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name, *command]
        return ["ip", "netns", "exec", self.host(name), *named] if self.separate else command

    def cut(self, name: str, others: list[str]) -> None:
        """Cuts a host off from others, in both directions; packets are dropped silently."""
        rules = "; ".join(f"ip {side} {self.addresses[other]} drop" for other in others for side in ("saddr", "daddr"))
        hooks = [f"chain {hook} {{ type filter hook {hook} priority 0; {rules}; }};" for hook in ("input", "output")]
        self.filter(name, f"add table inet potstill {{ {' '.join(hooks)} }}")

    def heal(self, name: str) -> None:
        self.filter(name, "delete table inet potstill")

    def filter(self, name: str, rules: str) -> None:
        ip("netns", "exec", self.host(name), "nft", rules)

    def remove(self) -> None:
        for namespace in self.made:
            subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)
        self.made.clear()


def slow_down(hosts: Hosts, names: list[str], rate: str) -> None:
    """Limits what these hosts send to a rate, as tc writes it."""
    for name in names:
        slow = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "1mb", "latency", "100ms"]
        subprocess.run(hosts.on(name, slow), check=True)
