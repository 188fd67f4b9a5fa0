//! The address at which the ranks of other machines reach those of this one.

use std::net::{IpAddr, ToSocketAddrs};

use anyhow::{Context, ensure};
use potstill_access::machine;

/// This machine's address on the route to the coordinator, where peers can reach it too.
///
/// # Errors
/// The coordinator's address cannot be resolved, or there is no route to it.
pub fn address_towards(coordinator: &str) -> anyhow::Result<IpAddr> {
    let target = coordinator
        .to_socket_addrs()
        .with_context(|| format!("{coordinator:?} is not a reachable address; expected host:port"))?
        .next()
        .with_context(|| format!("{coordinator:?} has no address"))?;
    if target.ip().is_loopback() {
        return Ok(target.ip());
    }
    machine::address_towards(target).with_context(|| format!("no route to the coordinator at {coordinator}"))
}

fn interfaces() -> anyhow::Result<Vec<(String, IpAddr)>> {
    machine::interfaces().context("the interfaces of this machine cannot be listed")
}

/// The address of an interface.
///
/// # Errors
/// There is no such interface, or it has no address; those that there are, by name.
pub fn address_of(interface: &str) -> anyhow::Result<IpAddr> {
    let all = interfaces()?;
    let own = all.iter().find(|(name, _)| name == interface);
    let names: Vec<_> = all.iter().map(|(name, ip)| format!("{name} ({ip})")).collect();
    Ok(own
        .with_context(|| {
            format!("no interface {interface} has an address here; there are {}", names.join(", "))
        })?
        .1)
}

/// The interface that has an address of this machine.
///
/// # Errors
/// It is no address of this machine.
pub fn interface_with(address: IpAddr) -> anyhow::Result<String> {
    let own = interfaces()?.into_iter().find(|(_, ip)| *ip == address);
    ensure!(own.is_some(), "{address} is no address of this machine");
    Ok(own.map(|(name, _)| name).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_and_addresses_belong_together() {
        let (name, ip) = interfaces().unwrap().into_iter().find(|(_, ip)| ip.is_loopback()).unwrap();
        assert_eq!(address_of(&name).unwrap(), ip);
        assert_eq!(interface_with(ip).unwrap(), name);
        assert!(address_of("nowhere0").unwrap_err().to_string().contains(&name));
        assert!(interface_with("192.0.2.1".parse().unwrap()).is_err());
        assert!(address_towards("127.0.0.1:80").unwrap().is_loopback());
    }
}
