//! The address at which the ranks of other machines reach those of this one.

use std::net::{IpAddr, ToSocketAddrs, UdpSocket};

use anyhow::{Context, ensure};
use nix::ifaddrs::getifaddrs;

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
    // No packet is sent: connecting a UDP socket only chooses the route.
    let unspecified = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(unspecified)?;
    socket.connect(target).with_context(|| format!("no route to the coordinator at {coordinator}"))?;
    Ok(socket.local_addr()?.ip())
}

/// The interfaces of this machine with their addresses; IPv4 first.
fn interfaces() -> anyhow::Result<Vec<(String, IpAddr)>> {
    let all = getifaddrs().context("the interfaces of this machine cannot be listed")?;
    let mut found: Vec<_> = all
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            let ip = v4.or_else(|| Some(IpAddr::V6(address.as_sockaddr_in6()?.ip())))?;
            Some((interface.interface_name, ip))
        })
        .collect();
    found.sort_by_key(|(_, ip)| ip.is_ipv6());
    Ok(found)
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
