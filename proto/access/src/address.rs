//! Addresses as people write them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};

/// The host and port of a coordinator, as `host:port`. `http://` before it is accepted, in either case, and changes nothing: whether
/// a connection is encrypted is the coordinator's choice. Spaces around it are passed over.
///
/// # Errors
/// Another scheme, no port, a path, or an address that is only listened on.
pub fn coordinator(text: &str) -> Result<String, String> {
    let expected = "expected host:port, such as node-1:7070 or [::1]:7070";
    let address = match text.trim().split_once("://") {
        Some((scheme, address)) if scheme.eq_ignore_ascii_case("http") => address,
        Some((scheme, _)) => {
            return Err(format!(
                "{scheme}:// is not a scheme here: {expected}. Connections are encrypted unless the coordinator was started \
                 with --insecure"
            ));
        }
        None => text.trim(),
    };
    let address = address.trim_end_matches('/');
    let (host, port) = address.rsplit_once(':').ok_or_else(|| format!("it has no port; {expected}"))?;
    let inside = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    if host.is_empty() || host.contains(['/', '@', ' ']) || (host.contains(':') && inside.is_none()) {
        return Err(format!("{host:?} is not a host; {expected}"));
    }
    if inside.unwrap_or(host).parse().is_ok_and(|ip: IpAddr| ip.to_canonical().is_unspecified()) {
        return Err(format!(
            "{host} stands for all interfaces of a machine, which only --listen takes: give the name or the address of the \
             coordinator's machine; {expected}"
        ));
    }
    match port.parse::<u16>() {
        Ok(0) => Err(format!(
            "port 0 lets the system choose a port, which only --listen takes: give the port at which the coordinator listens; \
             {expected}"
        )),
        Ok(_) => Ok(address.to_owned()),
        Err(_) => Err(format!("{port:?} is not a port; {expected}")),
    }
}

/// An address to listen on: `127.0.0.1:7070`, `localhost:7070`, or `:7070` for all interfaces. Spaces around it are passed over.
///
/// # Errors
/// It is not one, or its name is not known on this machine.
pub fn listening(text: &str) -> Result<SocketAddr, String> {
    let expected = "expected an address and a port, such as 0.0.0.0:7070, localhost:7070 or :7070";
    let text = text.trim();
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
            ("HTTP://node-1:7070", "node-1:7070"),
            (" node-1:7070\n", "node-1:7070"),
        ] {
            assert_eq!(coordinator(text).as_deref(), Ok(expected));
        }
        for (text, problem) in [
            ("https://node:7070", "https:// is not a scheme"),
            ("tcp://node:7070", "tcp:// is not a scheme"),
            ("Https://node:7070", "Https:// is not a scheme"),
            ("GRPC://node:7070", "GRPC:// is not a scheme"),
            ("node", "no port"),
            ("node:http", "is not a port"),
            ("node:0", "port 0 lets the system choose"),
            ("http://node:0/", "port 0 lets the system choose"),
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
    fn what_is_only_listened_on_is_no_coordinator() {
        for text in
            ["0.0.0.0:1", "[::]:7070", "HTTP://0.0.0.0:7070/", "[0:0::0]:7070", "[::ffff:0.0.0.0]:7070"]
        {
            let said = coordinator(text).unwrap_err();
            assert!(said.contains("all interfaces") && said.contains("--listen"), "{text}: {said}");
        }
        assert_eq!(coordinator("0.0.0.1:7070").as_deref(), Ok("0.0.0.1:7070"));
    }

    #[test]
    fn one_listens_on_addresses_names_and_all_interfaces() {
        for (text, expected) in [
            ("127.0.0.1:7070", "127.0.0.1:7070"),
            (":7070", "0.0.0.0:7070"),
            ("[::1]:0", "[::1]:0"),
            (" :7070\n", "0.0.0.0:7070"),
        ] {
            assert_eq!(listening(text), Ok(expected.parse().unwrap()), "{text}");
        }
        assert!(listening("localhost:7070").is_ok_and(|address| address.ip().is_loopback()));
        for text in ["7070", "http://localhost:7070", "127.0.0.1:http", "no such host:1"] {
            assert!(listening(text).is_err_and(|said| said.contains("expected")), "{text}");
        }
    }
}
