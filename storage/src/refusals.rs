//! What the stores' refusals mean, and what to do about them. A refusal is the same at the next attempt.

use object_store::Error as StoreError;

/// The environment variables in which credentials are given, of the store of a URL.
fn variables(place: &str) -> &'static str {
    match place.split("://").next() {
        Some("gs") => "GOOGLE_SERVICE_ACCOUNT or GOOGLE_APPLICATION_CREDENTIALS",
        Some("az") => "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_SAS_KEY",
        _ => "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or AWS_PROFILE",
    }
}

/// What to do about an error that is a refusal; `None` for errors that may pass.
pub(crate) fn advice(error: &StoreError, place: &str) -> Option<String> {
    let text = error.to_string();
    let code = between(&text, "<Code>", "</Code>").unwrap_or_default();
    Some(match code {
        "AccessDenied" | "AllAccessDisabled" | "AuthorizationFailure" | "AuthorizationPermissionMismatch" => {
            "the credentials do not allow it: a run reads, writes, lists and deletes".to_owned()
        }
        "InvalidAccessKeyId"
        | "SignatureDoesNotMatch"
        | "AuthenticationFailed"
        | "InvalidAuthenticationInfo" => {
            format!("the credentials are not known there: check {} and the endpoint", variables(place))
        }
        "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired" => {
            format!("the credentials have expired: get new ones for {}", variables(place))
        }
        "RequestTimeTooSkewed" => "the clock of this machine is wrong: set it".to_owned(),
        "AuthorizationHeaderMalformed" | "PermanentRedirect" | "IllegalLocationConstraintException" => {
            REGION.to_owned()
        }
        "NoSuchBucket" | "ContainerNotFound" | "InvalidBucketName" => {
            "there is no such bucket or container".to_owned()
        }
        "NotImplemented" => NOT_THERE.to_owned(),
        _ if text.contains("redirect without LOCATION") => REGION.to_owned(),
        _ if text.contains("501 Not Implemented") => NOT_THERE.to_owned(),
        // Without a code of its own.
        "" if matches!(error, StoreError::PermissionDenied { .. } | StoreError::Unauthenticated { .. })
            && place.contains("://") =>
        {
            format!("it refuses the credentials: check {}", variables(place))
        }
        _ => return None,
    })
}

const REGION: &str = "the bucket is in another region: set AWS_REGION to that";
const NOT_THERE: &str =
    "it does not know what a run needs of it, such as writes that replace nothing (If-None-Match: *)";

/// An error as text: the store's own code and message in the place of its XML, and what to do.
pub(crate) fn told(error: &StoreError, place: &str) -> String {
    let text = error.to_string();
    let said = match (between(&text, "<Code>", "</Code>"), between(&text, "<Message>", "</Message>")) {
        (Some(code), Some(message)) => {
            format!("the store says {code}: {}", message.split_whitespace().collect::<Vec<_>>().join(" "))
        }
        (Some(code), None) => format!("the store says {code}"),
        // Addresses at which clouds give credentials to their own machines.
        _ if ["169.254.169.254", "169.254.170.2", "metadata.google.internal"]
            .iter()
            .any(|at| text.contains(at)) =>
        {
            return format!(
                "there are no credentials: this machine's cloud gives none ({text}); set {}",
                variables(place)
            );
        }
        _ => text,
    };
    match advice(error, place) {
        Some(advice) => format!("{said} ({advice})"),
        None => said,
    }
}

fn between<'a>(text: &'a str, start: &str, end: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(start)?;
    rest.split_once(end).map(|(inside, _)| inside.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(text: &str) -> StoreError {
        StoreError::Generic { store: "S3", source: text.to_owned().into() }
    }

    #[test]
    fn refusals_say_what_to_do_and_other_errors_are_as_they_are() {
        for (text, part) in [
            (
                "400: <Error><Code>ExpiredToken</Code><Message>It has\n expired.</Message></Error>",
                "AWS_SESSION_TOKEN",
            ),
            ("400: <Error><Code>AuthorizationHeaderMalformed</Code></Error>", "AWS_REGION"),
            ("403: <Error><Code>RequestTimeTooSkewed</Code></Error>", "clock"),
            ("404: <Error><Code>NoSuchBucket</Code></Error>", "no such bucket"),
            ("Received redirect without LOCATION", "AWS_REGION"),
            ("Server returned 501 Not Implemented", "If-None-Match"),
        ] {
            let error = generic(text);
            assert!(advice(&error, "s3://b").is_some(), "{text}");
            let told = told(&error, "s3://b");
            assert!(told.contains(part) && !told.contains("<Code>"), "{told}");
        }
        let passing = generic("503: <Error><Code>SlowDown</Code><Message>Slower.</Message></Error>");
        assert!(advice(&passing, "s3://b").is_none());
        assert_eq!(told(&passing, "s3://b"), "the store says SlowDown: Slower.");
        assert!(told(&generic("connection reset"), "s3://b").contains("connection reset"));
        let none = told(&generic("PUT http://169.254.169.254/latest/api/token"), "s3://b");
        assert!(none.starts_with("there are no credentials") && none.contains("AWS_PROFILE"), "{none}");
    }
}
