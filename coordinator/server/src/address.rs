//! The addresses of a coordinator, for this machine and for others.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

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

/// The address for other machines, as far as this one knows it: with its host name.
#[must_use]
pub fn advertised(address: SocketAddr) -> String {
    let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    match host {
        Some(host) if address.ip().is_unspecified() => format!("{host}:{}", address.port()),
        _ => address.to_string(),
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
        assert!(!advertised("0.0.0.0:7070".parse().unwrap()).starts_with("0.0.0.0"));
    }
}
