//! The join key, roles, and the tokens that follow from them.

use std::{fmt, str::FromStr};

use ring::{hmac, rand::SecureRandom};

use crate::AccessError;

/// Before the role in what is authenticated: tokens of other programs that share a key are no tokens here.
const CONTEXT: &str = "potstill role ";

/// What a caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Attach as a worker, and see the status.
    Worker,
    /// Save a checkpoint, cancel the run, and see the status.
    Operator,
    /// See the status.
    Viewer,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Worker, Self::Operator, Self::Viewer];

    /// Its name, as in `--role`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Operator => "operator",
            Self::Viewer => "viewer",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|role| role.name() == name);
        known.ok_or_else(|| format!("there is no role {name:?}; expected worker, operator or viewer"))
    }
}

/// A run's join key: 256 random bits, from which the token of each role follows.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinKey([u8; 32]);

impl fmt::Debug for JoinKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinKey(secret)")
    }
}

impl JoinKey {
    /// A new one.
    ///
    /// # Errors
    /// The system gives no random numbers.
    pub fn generate() -> Result<Self, AccessError> {
        random().map(Self)
    }

    /// Reads its text: 64 hexadecimal digits. `None` for anything else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let bytes = from_hex(text)?;
        Some(Self(bytes.try_into().ok()?))
    }

    /// Its text, for the file that keeps it.
    #[must_use]
    pub fn to_text(&self) -> String {
        to_hex(&self.0)
    }

    /// The token of a role, as text: `worker.` and 64 hexadecimal digits, HMAC-SHA-256 of the role's name.
    #[must_use]
    pub fn token(&self, role: Role) -> String {
        let tag = hmac::sign(&self.hmac_key(), said(role).as_bytes());
        format!("{role}.{}", to_hex(tag.as_ref()))
    }

    /// The role whose token this is, if it is one of this key's. Takes as long for a wrong token as for a right one.
    #[must_use]
    pub fn role_of(&self, token: &str) -> Option<Role> {
        let (name, digits) = token.split_once('.')?;
        let role: Role = name.parse().ok()?;
        let tag = from_hex(digits)?;
        hmac::verify(&self.hmac_key(), said(role).as_bytes(), &tag).is_ok().then_some(role)
    }

    fn hmac_key(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &self.0)
    }
}

fn said(role: Role) -> String {
    format!("{CONTEXT}{role}")
}

/// The token in a value of the header `authorization`.
#[must_use]
pub fn bearer(value: &str) -> Option<&str> {
    value.strip_prefix("Bearer ")
}

/// Random bytes for a secret.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], AccessError> {
    let mut bytes = [0; N];
    let drawn = ring::rand::SystemRandom::new().fill(&mut bytes);
    drawn.map(|()| bytes).map_err(|_| AccessError::NoRandomNumbers)
}

pub(crate) fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|c| c.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len()).step_by(2).map(|start| u8::from_str_radix(text.get(start..start + 2)?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_token_is_of_one_key_and_one_role() {
        let (key, other) = (JoinKey::generate().unwrap(), JoinKey::generate().unwrap());
        for role in Role::ALL {
            let token = key.token(role);
            assert_eq!(key.role_of(&token), Some(role));
            assert_eq!(other.role_of(&token), None);
            for claimed in Role::ALL.into_iter().filter(|claimed| *claimed != role) {
                let (_, digits) = token.split_once('.').unwrap();
                assert_eq!(key.role_of(&format!("{claimed}.{digits}")), None);
            }
        }
    }

    /// Python: `hmac.new(bytes(range(32)), b"potstill role viewer", "sha256").hexdigest()`.
    #[test]
    fn a_token_is_an_hmac_of_the_role() {
        let key = JoinKey::parse("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f").unwrap();
        assert_eq!(
            key.token(Role::Viewer),
            "viewer.b335bc48e1240e7abf2aa960d150f691ebc8cbee8ffa51f4f1a55748b11e8bbd"
        );
    }

    #[test]
    fn a_key_can_be_written_and_read_and_is_not_shown() {
        let key = JoinKey::generate().unwrap();
        assert_eq!(JoinKey::parse(&key.to_text()), Some(key.clone()));
        assert!(!format!("{key:?}").contains(&key.to_text()[..8]));
        assert_eq!(JoinKey::parse("ab"), None);
        assert_eq!(JoinKey::parse(&"g".repeat(64)), None);
    }

    proptest! {
        #[test]
        fn any_text_is_a_wrong_token_or_none(text in ".{0,200}") {
            let key = JoinKey([7; 32]);
            prop_assert_eq!(key.role_of(&text), None);
            prop_assert_eq!(key.role_of(&format!("worker.{text}")), None);
            let _ = JoinKey::parse(&text);
        }
    }
}
