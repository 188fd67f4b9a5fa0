//! The addresses of this machine, for those that others are to be told.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
};

use nix::ifaddrs::getifaddrs;

/// The interfaces of this machine with their addresses, IPv4 first.
///
/// # Errors
/// The system's.
pub fn interfaces() -> io::Result<Vec<(String, IpAddr)>> {
    let mut found: Vec<_> = getifaddrs()?
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

/// This machine's address on the route to `target`. No packet is sent: connecting a UDP socket only chooses the route.
///
/// # Errors
/// There is no route.
pub fn address_towards(target: SocketAddr) -> io::Result<IpAddr> {
    let socket = UdpSocket::bind(if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.connect(target)?;
    Ok(socket.local_addr()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_to_a_loopback_address_is_that_interface() {
        let towards = address_towards("127.0.0.1:9".parse().unwrap()).unwrap();
        assert!(interfaces().unwrap().iter().any(|(_, ip)| *ip == towards && ip.is_loopback()));
    }
}
