//! JSON over HTTP, on the loopback.

use std::time::Duration;

use serde_json::Value;
use ureq::Agent;

/// A client; an answer with a status of an error is an answer.
pub(crate) fn client() -> Agent {
    let config = Agent::config_builder().http_status_as_error(false).proxy(None);
    config.timeout_global(Some(Duration::from_mins(1))).build().new_agent()
}

/// The status and the JSON of an answer; `Null` if it is no JSON.
pub(crate) fn answer(result: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<(u16, Value), String> {
    let mut response = result.map_err(|error| error.to_string())?;
    let status = response.status().as_u16();
    let text =
        response.body_mut().with_config().limit(256 << 20).read_to_string().map_err(|error| error.to_string())?;
    Ok((status, serde_json::from_str(&text).unwrap_or(Value::Null)))
}
