//! The client's side of SCRAM-SHA-256 (RFC 5802, RFC 7677), without channel binding.
//!
//! It proves that we know the password without telling it, and that the server knows it too.

use std::num::NonZeroU32;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::{digest, hmac, pbkdf2};

use crate::stores::network::secret::Secret;
use crate::sys::random::random;

/// The most iterations a server may ask for. Its own default is 4096
/// (RethinkDB src/clustering/administration/auth/password.hpp: default_iteration_count).
pub const MAX_ITERATIONS: u32 = 1_000_000;

/// The fewest that RFC 7677 (section 4) lets a server ask for. With fewer, somebody in the server's place has our proof
/// and can try many passwords on it in a short time.
pub const MIN_ITERATIONS: u32 = 4096;

/// `n,,`: no channel binding, no other identity (RFC 5802, section 7: gs2-header).
const GS2_HEADER: &str = "n,,";
/// The same in base64, as the final message repeats it.
const CHANNEL_BINDING: &str = "biws";

/// What is said first.
pub struct First {
    bare: String,
    nonce: String,
    least_iterations: u32,
}

/// What is said last, and what the server must answer it with.
#[derive(Debug)]
pub struct Final {
    pub message: String,
    auth_message: String,
    server_key: hmac::Key,
}

/// The server's part does not follow the rules.
#[derive(Debug, PartialEq, Eq)]
pub struct Violation(pub &'static str);

impl First {
    pub fn new(user: &str) -> First {
        First::with_nonce(user, STANDARD.encode(random::<18>()))
    }

    /// With a nonce that is not random: for tests.
    pub fn with_nonce(user: &str, nonce: String) -> First {
        let name = user.replace('=', "=3D").replace(',', "=2C");
        First { bare: format!("n={name},r={nonce}"), nonce, least_iterations: 1 }
    }

    /// Answers no challenge that asks for fewer rounds of hashing.
    pub fn with_least_iterations(self, least_iterations: u32) -> First {
        First { least_iterations, ..self }
    }

    pub fn message(&self) -> String {
        format!("{GS2_HEADER}{}", self.bare)
    }

    /// Answers the server's challenge. Takes a while: as many rounds of hashing as the server asks for.
    pub fn answer(&self, challenge: &str, password: &Secret) -> Result<Final, Violation> {
        let (mut nonce, mut salt, mut iterations) = (None, None, None);
        for part in challenge.split(',') {
            let known = match part.split_once('=') {
                Some(("r", value)) => nonce.replace(value).is_none(),
                Some(("s", value)) => salt.replace(value).is_none(),
                Some(("i", value)) => iterations.replace(value).is_none(),
                // RFC 5802, section 5.1: a mandatory extension that we don't know.
                Some(("m", _)) | None => false,
                Some(_) => true,
            };
            if !known {
                return Err(Violation("its challenge is malformed"));
            }
        }
        let nonce = nonce.ok_or(Violation("its challenge has no nonce"))?;
        if !nonce.starts_with(&self.nonce) || nonce.len() == self.nonce.len() {
            return Err(Violation("its nonce does not continue ours"));
        }
        let salt = salt
            .and_then(|salt| STANDARD.decode(salt).ok())
            .filter(|salt| !salt.is_empty())
            .ok_or(Violation("its challenge has no salt"))?;
        let iterations = iterations
            .and_then(|number| number.parse::<NonZeroU32>().ok())
            .ok_or(Violation("its challenge has no iteration count"))?;
        if iterations.get() > MAX_ITERATIONS {
            return Err(Violation("it asks for more than 1,000,000 rounds of hashing"));
        }
        if iterations.get() < self.least_iterations {
            return Err(Violation(
                "it asks for fewer than 4096 rounds of hashing on a connection without TLS, where an impostor could \
                 then guess the password. Set the password again without naming iterations, or use TLS",
            ));
        }
        let mut salted = [0; digest::SHA256_OUTPUT_LEN];
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, iterations, &salt, password.0.as_bytes(), &mut salted);
        let salted = hmac::Key::new(hmac::HMAC_SHA256, &salted);
        let client_key = hmac::sign(&salted, b"Client Key");
        let stored_key = digest::digest(&digest::SHA256, client_key.as_ref());
        let without_proof = format!("c={CHANNEL_BINDING},r={nonce}");
        let auth_message = format!("{},{challenge},{without_proof}", self.bare);
        let signature = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, stored_key.as_ref()), auth_message.as_bytes());
        let proof: Vec<u8> = client_key.as_ref().iter().zip(signature.as_ref()).map(|(key, sign)| key ^ sign).collect();
        let server_key = hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(&salted, b"Server Key").as_ref());
        Ok(Final { message: format!("{without_proof},p={}", STANDARD.encode(proof)), auth_message, server_key })
    }
}

impl Final {
    /// Whether the server has proved that it knows the password, compared in constant time.
    pub fn verify(&self, answer: &str) -> Result<(), Violation> {
        answer
            .strip_prefix("v=")
            .and_then(|proof| STANDARD.decode(proof).ok())
            .and_then(|proof| hmac::verify(&self.server_key, self.auth_message.as_bytes(), &proof).ok())
            .ok_or(Violation("it could not prove that it knows the password, and may be an impostor"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stores::rethinkdb::testing::Random;

    fn first() -> First {
        First::with_nonce("user", "rOprNGfwEbeRWgbNEkqO".into())
    }

    const CHALLENGE: &str = "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";

    /// The example of RFC 7677, section 3.
    #[test]
    fn the_rfcs_example() {
        let first = first();
        assert_eq!(first.message(), "n,,n=user,r=rOprNGfwEbeRWgbNEkqO");
        let last = first.answer(CHALLENGE, &Secret("pencil".into())).unwrap();
        assert_eq!(
            last.message,
            "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
        );
        last.verify("v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=").unwrap();
        for wrong in ["", "v=", "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G5=", "e=other-error", "v=////"] {
            last.verify(wrong).unwrap_err();
        }
    }

    #[test]
    fn a_challenge_is_checked() {
        let refuse = |challenge: &str| first().answer(challenge, &Secret("pencil".into())).unwrap_err();
        for challenge in [
            "",
            "r=rOprNGfwEbeRWgbNEkqO,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096",
            "r=somebodyElsesNonceAltogether,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096",
            "r=rOprNGfwEbeRWgbNEkqO1,s=,i=4096",
            "r=rOprNGfwEbeRWgbNEkqO1,s=***,i=4096",
            "r=rOprNGfwEbeRWgbNEkqO1,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=0",
            "r=rOprNGfwEbeRWgbNEkqO1,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4294967295",
            "r=rOprNGfwEbeRWgbNEkqO1,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=-1",
            "m=x,r=rOprNGfwEbeRWgbNEkqO1,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=1",
            "r=rOprNGfwEbeRWgbNEkqO1,r=rOprNGfwEbeRWgbNEkqO2,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=1",
        ] {
            refuse(challenge);
        }
        let mut random = Random::seeded();
        for _ in 0..500 {
            let mut challenge = CHALLENGE.as_bytes().to_vec();
            let at = random.below(challenge.len());
            challenge[at] = random.next() as u8;
            challenge.truncate(random.below(challenge.len()));
            if let Ok(challenge) = String::from_utf8(challenge) {
                let _ = first().answer(&challenge.replace("i=", "i=0"), &Secret("pencil".into()));
            }
        }
    }

    #[test]
    fn names_are_escaped() {
        assert_eq!(First::with_nonce("a,b=c", "N".into()).message(), "n,,n=a=2Cb=3Dc,r=N");
    }
}
