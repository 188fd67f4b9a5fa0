//! The addresses of a coordinator, for this machine and for others.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use potstill_access::machine::{self, address_towards};

/// Addresses that lead nowhere (RFC 5737, RFC 3849): the route to them is the default route.
const ELSEWHERE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];

/// The address at which this machine reaches a coordinator that listens on `address`.
#[must_use]
pub fn local(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

/// The address for other machines, as far as this one knows it. Not by the host's name, which often stands for a loopback
/// address on the host itself, and for nothing on others.
#[must_use]
pub fn advertised(address: SocketAddr) -> String {
    if !address.ip().is_unspecified() {
        return address.to_string();
    }
    let takes = |ip: &IpAddr| address.is_ipv6() || ip.is_ipv4();
    let routed = ELSEWHERE.into_iter().filter_map(|target| address_towards((target, 9).into()).ok());
    let ip = routed.filter(reaches).chain(interfaces()).find(takes);
    ip.map_or_else(|| local(address).to_string(), |ip| SocketAddr::new(ip, address.port()).to_string())
}

/// The addresses of this machine's interfaces that other machines may reach.
fn interfaces() -> impl Iterator<Item = IpAddr> {
    machine::interfaces().unwrap_or_default().into_iter().map(|(_, ip)| ip).filter(reaches)
}

/// Whether other machines may reach an address of this one.
fn reaches(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_unspecified() && !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unspecified() && !ip.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unspecified_address_is_reached_locally() {
        let of = |text: &str| local(text.parse().unwrap()).to_string();
        assert_eq!(of("0.0.0.0:7070"), "127.0.0.1:7070");
        assert_eq!(of("[::]:7070"), "[::1]:7070");
        assert_eq!(of("10.0.0.1:7070"), "10.0.0.1:7070");
    }

    #[test]
    fn workers_are_told_an_address_that_they_can_use() {
        assert_eq!(advertised("10.0.0.1:7070".parse().unwrap()), "10.0.0.1:7070");
        for listened in ["0.0.0.0:7070", "[::]:7070"] {
            let told: SocketAddr = advertised(listened.parse().unwrap()).parse().unwrap();
            assert!(!told.ip().is_unspecified());
            assert_eq!(told.port(), 7070);
        }
        assert!(advertised("0.0.0.0:7070".parse().unwrap()).parse::<SocketAddr>().unwrap().is_ipv4());
        let alone = interfaces().next().is_none();
        assert!(alone || !advertised("0.0.0.0:7070".parse().unwrap()).starts_with("127."));
    }
}
