//! The shared files of AWS's tools, `~/.aws/credentials` and `~/.aws/config`: static keys, region and endpoint of a profile, for a
//! client that itself reads the environment alone.
//!
//! As with those tools, keys in the environment come before a profile's, whose region and endpoint then still count.

use std::{collections::BTreeMap, path::PathBuf};

use ini::{Ini, Properties};

const KEY: &str = "AWS_ACCESS_KEY_ID";
const PROFILE: &str = "AWS_PROFILE";
const REGION: &str = "AWS_REGION";
/// The other variable of the region.
const DEFAULT_REGION: &str = "AWS_DEFAULT_REGION";
/// The settings that are taken, and the variables for which they stand.
const TAKEN: [(&str, &str); 4] = [
    ("aws_access_key_id", KEY),
    ("aws_secret_access_key", "AWS_SECRET_ACCESS_KEY"),
    ("aws_session_token", "AWS_SESSION_TOKEN"),
    ("region", REGION),
];
/// The variables that set the endpoint of a store, each of which comes before those of a profile.
const ENDPOINTS: [&str; 3] = ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"];
/// Variables that select other credentials. They take precedence over a profile that was not named explicitly.
const OTHERS: [&str; 3] = [
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
];
/// Settings of a profile from which keys could be had, but not here.
const NOT_READ: [&str; 7] = [
    "credential_process",
    "credential_source",
    "login_session",
    "role_arn",
    "source_profile",
    "sso_session",
    "sso_start_url",
];

/// The variables, with those of the profile that they name, or of `default`; without its keys where they hold keys.
///
/// # Errors
/// The profile is not there, holds no keys, or gets them in a way that is not read; a file cannot be read.
pub(crate) fn with_profile(
    variables: impl IntoIterator<Item = (String, String)>,
) -> Result<BTreeMap<String, String>, String> {
    let mut variables: BTreeMap<String, String> = variables.into_iter().collect();
    let is_set = |name: &str| variables.get(name).is_some_and(|value| !value.is_empty());
    let has_keys = is_set(KEY) || (!is_set(PROFILE) && OTHERS.iter().any(|name| is_set(name)));
    let named = variables.get(PROFILE).filter(|name| !name.is_empty()).cloned();
    let profile = named.as_deref().unwrap_or("default");
    let file = |variable: &str, name: &str| {
        let home = variables.get("HOME").map(|home| PathBuf::from(home).join(".aws").join(name));
        variables.get(variable).map(PathBuf::from).or(home)
    };
    let credentials = section(file("AWS_SHARED_CREDENTIALS_FILE", "credentials"), &[profile])?;
    let prefixed = format!("profile {profile}");
    let config_file = file("AWS_CONFIG_FILE", "config");
    let config = section(config_file.clone(), &[&prefixed, profile])?;
    let found = |key: &str| {
        let value = [&credentials, &config].into_iter().flatten().find_map(|section| section.get(key));
        value.filter(|value| !value.is_empty()).map(str::to_owned)
    };
    let other = NOT_READ.iter().find(|key| found(key).is_some());
    if !has_keys && found(TAKEN[0].0).is_none() && (named.is_some() || other.is_some()) {
        let advice = "give AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN instead, as in eval \"$(aws configure \
                      export-credentials --format env)\"";
        if credentials.is_none() && config.is_none() {
            return Err(format!(
                "{PROFILE} names {profile}, which is neither in AWS's credentials file nor in its config file"
            ));
        }
        let why = match other {
            Some(key) => format!("gets its keys by {key}, which is not read"),
            None => "holds no keys".to_owned(),
        };
        return Err(format!("the profile {profile} of AWS's files {why}: {advice}"));
    }
    let is_wanted = |variable: &str| match variable {
        REGION => !is_set(DEFAULT_REGION),
        _ => !has_keys,
    };
    let taken = TAKEN.iter().filter(|(_, variable)| is_wanted(variable));
    let mut taken: Vec<(&str, String)> =
        taken.filter_map(|(key, variable)| Some((*variable, found(key)?))).collect();
    if !ENDPOINTS.iter().any(|name| is_set(name)) {
        let of_s3 = match found("services") {
            Some(services) => endpoint_of_s3(config_file, profile, &services)?,
            None => None,
        };
        if let Some(endpoint) = of_s3.or_else(|| found("endpoint_url")) {
            if !endpoint.contains("://") {
                return Err(format!(
                    "the endpoint_url of the profile {profile} of AWS's files is {endpoint:?}; an endpoint begins with https:// \
                     or http://"
                ));
            }
            taken.push((ENDPOINTS[0], endpoint));
        }
    }
    for (variable, value) in taken {
        // The region may be given in the environment.
        let present = variables.entry(variable.to_owned()).or_default();
        if present.is_empty() {
            *present = value;
        }
    }
    Ok(variables)
}

/// The endpoint of S3 in the section `services` that a profile names.
fn endpoint_of_s3(config: Option<PathBuf>, profile: &str, services: &str) -> Result<Option<String>, String> {
    let name = format!("services {services}");
    let section = section(config, &[&name])?.ok_or_else(|| {
        format!(
            "the profile {profile} of AWS's files has services = {services}, and the config file has no section [{name}]: add \
             it, or remove that line"
        )
    })?;
    Ok(section.get("s3.endpoint_url").filter(|value| !value.is_empty()).map(str::to_owned))
}

/// The first of these sections that a file has; none where there is no such file.
fn section(file: Option<PathBuf>, names: &[&str]) -> Result<Option<Properties>, String> {
    let Some(file) = file else { return Ok(None) };
    let text = match std::fs::read_to_string(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("cannot read {}: {error}", file.display())),
    };
    let parsed =
        Ini::load_from_str_noescape(&flat(&text)).map_err(|error| format!("{}: {error}", file.display()))?;
    Ok(names.iter().find_map(|name| parsed.section(Some(*name)).cloned()))
}

/// A file with each setting that is nested below another, as in `s3 =` and then, indented, `endpoint_url = …`, under the name of both:
/// `s3.endpoint_url = …`. The reader of the file has no nesting.
fn flat(text: &str) -> String {
    let mut parent = None;
    let lines = text.lines().map(|line| {
        let setting = line.trim();
        // The reader would also take an indented comment for a setting.
        if setting.is_empty() || setting.starts_with(['#', ';']) {
            return setting.to_owned();
        }
        if line.starts_with([' ', '\t']) {
            return parent.map_or_else(|| line.to_owned(), |parent| format!("{parent}.{setting}"));
        }
        parent = setting.strip_suffix('=').map(str::trim_end);
        line.to_owned()
    });
    lines.collect::<Vec<String>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home(credentials: &str, config: &str) -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join(".aws")).unwrap();
        std::fs::write(home.path().join(".aws/credentials"), credentials).unwrap();
        std::fs::write(home.path().join(".aws/config"), config).unwrap();
        home
    }

    fn read(home: &tempfile::TempDir, given: &[(&str, &str)]) -> Result<BTreeMap<String, String>, String> {
        let given = given.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        with_profile(given.chain([("HOME".to_owned(), home.path().display().to_string())]))
    }

    const CREDENTIALS: &str = "[default]\naws_access_key_id = A\naws_secret_access_key = a/b+c=\n\n[lab]\naws_access_key_id=B\n\
                               aws_secret_access_key=b\naws_session_token=t#1;2\n";
    const CONFIG: &str = "[default]\nregion = eu-central-1\n[profile lab]\nregion = us-west-2\nendpoint_url = http://minio:9000\n\
                          [profile sso]\nsso_session = x\n[profile empty]\nregion = us-east-1\n";

    #[test]
    fn a_profile_gives_keys_region_and_endpoint() {
        let home = home(CREDENTIALS, CONFIG);
        let found = read(&home, &[]).unwrap();
        assert_eq!(
            [&found[KEY], &found["AWS_SECRET_ACCESS_KEY"], &found["AWS_REGION"]],
            ["A", "a/b+c=", "eu-central-1"]
        );
        let found = read(&home, &[(PROFILE, "lab"), ("AWS_REGION", "here")]).unwrap();
        assert_eq!([&found[KEY], &found["AWS_SESSION_TOKEN"], &found["AWS_REGION"]], ["B", "t#1;2", "here"]);
        assert_eq!(found["AWS_ENDPOINT_URL"], "http://minio:9000");
    }

    #[test]
    fn endpoints_of_services_come_before_the_one_of_the_profile_and_after_the_environments() {
        let config = "[profile lab]\nservices = own\nendpoint_url = http://all:1\ns3 =\n  endpoint_url = http://no:1\n\
                      [services own]\ndynamodb =\n  endpoint_url = http://tables:1\ns3 = \n\n  # of MinIO\n  endpoint_url = \
                      http://minio:9000\nsqs =\n\tendpoint_url = http://queues:1\n[services tables]\ndynamodb =\n  \
                      endpoint_url = http://tables:1\n";
        let endpoint = |config: &str, given: &[(&str, &str)]| {
            let home = home(CREDENTIALS, config);
            let found = read(&home, &[&[(PROFILE, "lab")][..], given].concat())?;
            Ok::<_, String>(found.get("AWS_ENDPOINT_URL").cloned())
        };
        let is = |url: &str| Ok(Some(url.to_owned()));
        assert_eq!(endpoint(config, &[]), is("http://minio:9000"));
        assert_eq!(endpoint(config, &[("AWS_ENDPOINT_URL", "http://here:1")]), is("http://here:1"));
        assert_eq!(endpoint(config, &[("AWS_ENDPOINT_URL", "")]), is("http://minio:9000"), "empty is none");
        for name in ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"] {
            assert_eq!(endpoint(config, &[(name, "http://here:1")]), Ok(None), "{name} is what counts");
        }
        let without_s3 = config.replace("services = own", "services = tables");
        assert_eq!(endpoint(&without_s3, &[]), is("http://all:1"));
        let nested = "[profile lab]\ns3 =\n  endpoint_url = http://no:1\n  max_concurrent_requests = 20\n";
        assert_eq!(endpoint(nested, &[]), Ok(None), "settings of s3 commands are none of the profile");
        let lost = endpoint("[profile lab]\nservices = lost\n", &[]).unwrap_err();
        assert!(lost.contains("lab") && lost.contains("[services lost]"), "{lost}");
        let bare = endpoint("[profile lab]\nendpoint_url = minio:9000\n", &[]).unwrap_err();
        assert!(bare.contains("endpoint_url") && bare.contains("https://"), "{bare}");
        let indented = "[profile lab]\n  region = us-west-2\n  endpoint_url = http://minio:9000\n";
        assert_eq!(endpoint(indented, &[]), is("http://minio:9000"));
    }

    #[test]
    fn keys_in_the_environment_come_first() {
        let home = home(CREDENTIALS, CONFIG);
        let found = read(&home, &[(KEY, "E"), (PROFILE, "lab")]).unwrap();
        assert_eq!((found[KEY].as_str(), found.get("AWS_SESSION_TOKEN")), ("E", None));
        assert_eq!([&found[REGION], &found["AWS_ENDPOINT_URL"]], ["us-west-2", "http://minio:9000"]);
        let found = read(&home, &[(KEY, "E"), (PROFILE, "lab"), (DEFAULT_REGION, "here")]).unwrap();
        assert_eq!(found.get(REGION), None);
        for profile in ["sso", "empty", "lost"] {
            assert_eq!(read(&home, &[(KEY, "E"), (PROFILE, profile)]).unwrap()[KEY], "E", "{profile}");
        }
        let found = read(&home, &[(OTHERS[0], "/token")]).unwrap();
        assert_eq!((found.get(KEY), found[REGION].as_str()), (None, "eu-central-1"));
    }

    #[test]
    fn a_profile_that_cannot_be_used_says_why() {
        let home = home(CREDENTIALS, CONFIG);
        for (profile, part) in [("sso", "sso_session"), ("empty", "holds no keys"), ("lost", "neither")] {
            let error = read(&home, &[(PROFILE, profile)]).unwrap_err();
            assert!(error.contains(part) && error.contains(profile), "{error}");
        }
        let sso = self::home("", "[default]\nsso_session = x\n");
        assert!(read(&sso, &[]).unwrap_err().contains("sso_session"), "the default profile too");
        let none = tempfile::tempdir().unwrap();
        assert_eq!(read(&none, &[]).unwrap().get(KEY), None);
    }
}
