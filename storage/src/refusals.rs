//! What the stores' refusals mean, and what to do about them. A refusal is the same at the next attempt.

use object_store::Error as StoreError;
use serde_json::Value;

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
    let code = Answer::of(&text).and_then(|answer| answer.code).unwrap_or_default();
    Some(match code.as_str() {
        "AccessDenied"
        | "AllAccessDisabled"
        | "AuthorizationFailure"
        | "AuthorizationPermissionMismatch"
        | "PERMISSION_DENIED" => {
            "the credentials do not allow it: a run reads, writes, lists and deletes".to_owned()
        }
        "InvalidAccessKeyId"
        | "SignatureDoesNotMatch"
        | "AuthenticationFailed"
        | "InvalidAuthenticationInfo"
        | "UNAUTHENTICATED"
        | "invalid_client"
        | "invalid_grant" => {
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
        // Without a word of its own.
        code if matches!(error, StoreError::PermissionDenied { .. } | StoreError::Unauthenticated { .. })
            && code.chars().all(|c| c.is_ascii_digit())
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

/// An error as one line of text: the store's own code and message in the place of its XML, JSON or HTML, and what to do.
pub(crate) fn told(error: &StoreError, place: &str) -> String {
    let text = error.to_string();
    // Addresses at which clouds give credentials to their own machines.
    let clouds = ["169.254.169.254", "169.254.170.2", "metadata.google.internal"];
    if clouds.iter().any(|at| text.contains(at)) {
        return format!(
            "there are no credentials: this machine's cloud gives none ({}); set {}",
            shortened(&one_line(&text)),
            variables(place)
        );
    }
    let said = match Answer::of(&text) {
        Some(answer) => format!("the store says {}", answer.line()),
        None => one_line(&text),
    };
    match advice(error, place) {
        Some(advice) => format!("{said} ({advice})"),
        None => said,
    }
}

/// What the body of an answer says.
struct Answer {
    /// The store's own code, where the body has one.
    code: Option<String>,
    /// The status of the answer, such as `502 Bad Gateway`.
    status: String,
    message: String,
}

impl Answer {
    /// The answer in the text of an error; `None` where no server has answered with anything.
    fn of(text: &str) -> Option<Self> {
        // As `object_store` writes it; what stands before is its own.
        let (status, body) = match text.split_once("non-2xx status code: ") {
            Some((_, answer)) => answer.split_once(": ").unwrap_or((answer, "")),
            None => ("", text.split_once("error response: ").map_or(text, |(_, body)| body)),
        };
        let (code, message) = match from_xml(body).or_else(|| from_json(body)) {
            Some((code, message)) => (code.map(|code| one_line(&code)), message),
            None if is_html(body) => {
                let title = between(body, "<title>", "</title>").map(unescaped).unwrap_or_default();
                let title = one_line(&title);
                let page =
                    "an HTML page and no store's answer: check the endpoint, and proxies on the way to it";
                (None, if title.is_empty() { page.to_owned() } else { format!("{title:?}, {page}") })
            }
            None if status.is_empty() => return None,
            None => (None, body.to_owned()),
        };
        let status = status.trim_end_matches(':').trim().to_owned();
        Some(Self { code, status, message: shortened(&one_line(&message)) })
    }

    /// `CODE: message`.
    fn line(&self) -> String {
        let code = self.code.as_deref().unwrap_or(&self.status);
        match (code, self.message.as_str()) {
            (code, "") => code.to_owned(),
            ("", message) => message.to_owned(),
            (code, message) => format!("{code}: {message}"),
        }
    }
}

/// The code, where there is one, and the message of an answer.
type Said = (Option<String>, String);

/// What an XML body says. Google's has its reason in the details.
fn from_xml(body: &str) -> Option<Said> {
    let code = between(body, "<Code>", "</Code>").or_else(|| between(body, "<code>", "</code>"))?;
    let texts = ["Message", "message", "Details"]
        .iter()
        .filter_map(|tag| between(body, &format!("<{tag}>"), &format!("</{tag}>")));
    Some((Some(unescaped(code)), texts.map(unescaped).collect::<Vec<_>>().join(" ")))
}

/// What a JSON body says: an object with code and message, or with such an object, or a list of such, under `error` or `errors`.
fn from_json(body: &str) -> Option<Said> {
    let start = body.find(['{', '['])?;
    // More may follow.
    let value = serde_json::Deserializer::from_str(&body[start..]).into_iter::<Value>().next()?.ok()?;
    in_object(&value)
}

fn in_object(value: &Value) -> Option<Said> {
    let object = value.get(0).unwrap_or(value).as_object()?;
    let text = |keys: &[&str]| keys.iter().find_map(|key| scalar(object.get(*key)?));
    let inside =
        ["error", "Error", "odata.error", "errors"].iter().find_map(|key| in_object(object.get(*key)?));
    let message = text(&["message", "Message", "error_description", "detail"]);
    // Google's code is a number, and its status is the word for that.
    let code = text(&["status", "code", "Code", "__type", "error"]);
    let own = (code.is_some() || message.is_some()).then(|| (code, message.unwrap_or_default()));
    match inside {
        Some((Some(code), message)) => Some((Some(code), message)),
        inside => own.or(inside),
    }
}

/// A text or a number; of a text in several languages the one that is there.
fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) if !text.is_empty() => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Object(object) => object.get("value").and_then(scalar),
        _ => None,
    }
}

fn is_html(body: &str) -> bool {
    let start: String = body.trim_start().chars().take(200).collect::<String>().to_lowercase();
    start.starts_with('<') && start.contains("<html")
}

/// Text of XML without its entities.
fn unescaped(text: &str) -> String {
    let entities =
        [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&apos;", "'"), ("&#39;", "'"), ("&#34;", "\"")];
    let plain = entities.iter().fold(text.to_owned(), |text, (entity, is)| text.replace(entity, is));
    plain.replace("&amp;", "&")
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The beginning of a text that is long: a page is no message.
fn shortened(text: &str) -> String {
    const LONGEST: usize = 400;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
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

    #[test]
    fn answers_of_all_kinds_are_one_readable_line() {
        const STATUS: &str = "Error performing PUT http://x in 1ms - Server returned non-2xx status code: ";
        for (answer, line) in [
            (
                "400 Bad Request: <?xml version=\"1.0\"?><Error><Code>Odd</Code><Message>No &quot;a&quot;\n &amp; b.</Message>\
                 <RequestId>7</RequestId></Error>",
                "Odd: No \"a\" & b.",
            ),
            (
                "403 Forbidden: <Error><Code>Odd</Code><Message>No.</Message><Details>x lacks y.</Details></Error>",
                "Odd: No. x lacks y.",
            ),
            (
                "400 Bad Request: {\n \"error\": {\"code\": 400, \"message\": \"Bad\\nname.\", \"status\": \
                 \"INVALID_ARGUMENT\", \"errors\": [{\"message\": \"Bad name.\", \"reason\": \"invalid\"}]}}",
                "INVALID_ARGUMENT: Bad name.",
            ),
            ("400 Bad Request: {\"Code\": \"Odd\", \"Message\": \"No.\"}", "Odd: No."),
            ("400 Bad Request: {\"errors\": [{\"code\": 10006, \"message\": \"None.\"}]}", "10006: None."),
            (
                "400 Bad Request: {\"odata.error\": {\"code\": \"Odd\", \"message\": {\"lang\": \"en\", \"value\": \
                 \"No.\"}}}",
                "Odd: No.",
            ),
            ("400 Bad Request: {\"message\": \"No.\"}", "400 Bad Request: No."),
            ("400 Bad Request: {\"a\": 1}", "400 Bad Request: {\"a\": 1}"),
            ("400 Bad Request: null [1]", "400 Bad Request: null [1]"),
            (
                "502 Bad Gateway: <!DOCTYPE html>\n<html><head><title>502 Bad\nGateway</title></head></html>",
                "502 Bad Gateway: \"502 Bad Gateway\", an HTML page and no store's answer: check the endpoint, and proxies \
                 on the way to it",
            ),
            ("500 Internal Server Error: one\n two", "500 Internal Server Error: one two"),
            ("500 Internal Server Error: ", "500 Internal Server Error"),
        ] {
            let told = told(&generic(&format!("{STATUS}{answer}")), "s3://b");
            assert_eq!(told, format!("the store says {line}"));
        }
        let grant = "400 Bad Request: {\"error\": \"invalid_grant\", \"error_description\": \"Invalid JWT Signature.\"}";
        let told = super::told(&generic(&format!("{STATUS}{grant}")), "gs://b");
        assert!(
            told.starts_with("the store says invalid_grant: Invalid JWT Signature. (the credentials"),
            "{told}"
        );
        assert!(told.contains("GOOGLE_SERVICE_ACCOUNT"), "{told}");
        let long = format!("{STATUS}400 Bad Request: {}", "x".repeat(5000));
        assert!(super::told(&generic(&long), "s3://b").len() < 500);
    }
}
