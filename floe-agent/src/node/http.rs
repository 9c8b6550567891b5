//! `/metrics`, `/healthz` and `/readyz`.

use std::net::SocketAddr;

use axum::{
    Router,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use thiserror::Error;
use tokio::net::TcpListener;

use super::metrics::{Observer, Trouble};

/// Media type of the OpenMetrics text format.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The server cannot be started.
#[derive(Debug, Error)]
#[error(
    "cannot listen at {address} for metrics: {source}; `internal_metrics: {{listen: ...}}` says where, `off` nowhere"
)]
pub struct HttpError {
    address: SocketAddr,
    source: std::io::Error,
}

/// Opens the port.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, HttpError> {
    TcpListener::bind(address).await.map_err(|source| HttpError { address, source })
}

/// Answers requests until the future is dropped.
pub async fn serve(listener: TcpListener, observer: Observer) {
    let answer = |what: fn(&Observer) -> Response| {
        let observer = observer.clone();
        // It waits for another thread.
        get(move || async move {
            let answer = tokio::task::spawn_blocking(move || what(&observer)).await;
            answer.unwrap_or_else(|_| StatusCode::INTERNAL_SERVER_ERROR.into_response())
        })
    };
    let router = Router::new()
        .route("/metrics", answer(metrics))
        .route("/healthz", answer(|observer| state(observer.health().map(|_| ()))))
        .route("/readyz", answer(|observer| state(observer.readiness())));
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!("the metrics server ended: {error}");
    }
}

fn metrics(observer: &Observer) -> Response {
    match observer.metrics() {
        Ok(text) => ([(CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(trouble) => state(Err(trouble)),
    }
}

fn state(state: Result<(), Trouble>) -> Response {
    match state {
        Ok(()) => "ok\n".into_response(),
        Err(trouble) => (StatusCode::SERVICE_UNAVAILABLE, format!("{trouble}\n")).into_response(),
    }
}
