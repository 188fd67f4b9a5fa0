//! Addresses as people write them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};

/// The host and port of a coordinator, as `host:port`. `http://` before it is accepted, and changes nothing: whether a connection
/// is encrypted is the coordinator's choice.
///
/// # Errors
/// Another scheme, no port, or a path.
pub fn coordinator(text: &str) -> Result<String, String> {
    let expected = "expected host:port, such as node-1:7070 or [::1]:7070";
    if let Some((scheme, _)) = text.split_once("://").filter(|(scheme, _)| *scheme != "http") {
        return Err(format!(
            "{scheme}:// is not a scheme here: {expected}. Connections are encrypted unless the coordinator was started with \
             --insecure"
        ));
    }
    let address = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
    let (host, port) = address.rsplit_once(':').ok_or_else(|| format!("it has no port; {expected}"))?;
    let bracketed = host.starts_with('[') && host.ends_with(']');
    if host.is_empty() || host.contains(['/', '@', ' ']) || (host.contains(':') && !bracketed) {
        return Err(format!("{host:?} is not a host; {expected}"));
    }
    match port.parse::<u16>() {
        Ok(port) if port > 0 => Ok(address.to_owned()),
        _ => Err(format!("{port:?} is not a port; {expected}")),
    }
}

/// An address to listen on: `127.0.0.1:7070`, `localhost:7070`, or `:7070` for all interfaces.
///
/// # Errors
/// It is not one, or its name is not known on this machine.
pub fn listening(text: &str) -> Result<SocketAddr, String> {
    let expected = "expected an address and a port, such as 0.0.0.0:7070, localhost:7070 or :7070";
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let (host, port) = text.rsplit_once(':').ok_or_else(|| format!("it has no port; {expected}"))?;
    let port = port.parse().map_err(|_| format!("{port:?} is not a port; {expected}"))?;
    if host.is_empty() {
        return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port));
    }
    if host.contains("//") {
        return Err(expected.to_owned());
    }
    let found = (host, port).to_socket_addrs().map_err(|error| format!("{host}: {error}; {expected}"))?;
    // A name's IPv4 address first: workers are given what is listened on.
    let mut found: Vec<SocketAddr> = found.collect();
    found.sort_by_key(SocketAddr::is_ipv6);
    found.into_iter().next().ok_or_else(|| format!("{host} has no address; {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coordinator_is_a_host_and_a_port() {
        for (text, expected) in [
            ("node-1:7070", "node-1:7070"),
            ("http://node_1:7070/", "node_1:7070"),
            ("[::1]:7070", "[::1]:7070"),
            ("10.0.0.1:1", "10.0.0.1:1"),
        ] {
            assert_eq!(coordinator(text).as_deref(), Ok(expected));
        }
        for (text, problem) in [
            ("https://node:7070", "https:// is not a scheme"),
            ("tcp://node:7070", "tcp:// is not a scheme"),
            ("node", "no port"),
            ("node:http", "is not a port"),
            ("node:0", "is not a port"),
            ("node:70700", "is not a port"),
            (":7070", "is not a host"),
            ("::1:7070", "is not a host"),
            ("http://node:7070/path", "is not a port"),
            ("", "no port"),
        ] {
            assert!(coordinator(text).is_err_and(|said| said.contains(problem)), "{text}");
        }
    }

    #[test]
    fn one_listens_on_addresses_names_and_all_interfaces() {
        for (text, expected) in
            [("127.0.0.1:7070", "127.0.0.1:7070"), (":7070", "0.0.0.0:7070"), ("[::1]:0", "[::1]:0")]
        {
            assert_eq!(listening(text), Ok(expected.parse().unwrap()), "{text}");
        }
        assert!(listening("localhost:7070").is_ok_and(|address| address.ip().is_loopback()));
        for text in ["7070", "http://localhost:7070", "127.0.0.1:http", "no such host:1"] {
            assert!(listening(text).is_err_and(|said| said.contains("expected")), "{text}");
        }
    }
}
