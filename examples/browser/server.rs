//! A web server for one page on this machine, by hand, because the small crate for it (tiny_http) has had no release since 2022 and the
//! others bring an asynchronous runtime: files of the site from memory, and reports of the page as events.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `GET /path` | | a file of the site, or `verdicts.json` |
//! | `POST /started` | the adapter's name | |
//! | `POST /skipped` | a line with the device's name, then what it takes that is not there | |
//! | `POST /runs/K` | bytes of the results | the verdict |
//! | `POST /runs/K/failed` | what went wrong | the verdict |
//! | `POST /failed`, `/finished` | why nothing can be run; | |

use super::judge::{Verdict, judge};
use super::site::Site;
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub enum Event {
    Started(String),
    /// Device, and what it takes that the browser or its adapter lacks.
    Skipped(String, String),
    Judged(Verdict),
    Failed(String),
    Finished,
}

pub struct Server {
    pub address: String,
    pub events: Receiver<Event>,
}

/// What the last page reported: `verdicts.json`.
#[derive(Default, Serialize)]
struct Reports {
    adapter: String,
    skipped: Vec<(String, String)>,
    verdicts: Vec<Verdict>,
}

struct Handler {
    site: Arc<Site>,
    events: Sender<Event>,
    reports: Mutex<Reports>,
}

struct Request {
    method: String,
    path: String,
    body: Vec<u8>,
}

/// The largest body that is read: results of a case are a few hundred KiB.
const MAX_BODY: usize = 64 << 20;
/// The longest request line or header.
const MAX_LINE: u64 = 16 << 10;

impl Server {
    /// Listens, for this machine only, and answers in threads of its own. Port 0 is a free one.
    pub fn start(site: Arc<Site>, port: u16) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))
            .with_context(|| format!("argument `port` is {port}, which cannot be listened on"))?;
        let address = format!("http://{}/", listener.local_addr()?);
        let (send, events) = channel();
        let handler = Arc::new(Handler { site, events: send, reports: Mutex::default() });
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // Browsers open connections ahead of need, so one that says nothing must not hold up the others.
                let handler = handler.clone();
                std::thread::spawn(move || {
                    if let Err(error) = handler.answer(&stream) {
                        let _ = respond(&stream, 400, "text/plain", format!("{error:#}").as_bytes());
                    }
                });
            }
        });
        Ok(Self { address, events })
    }
}

impl Handler {
    fn answer(&self, stream: &TcpStream) -> Result<()> {
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let Some(Request { method, path, body }) = read(stream)? else { return Ok(()) };
        match (method.as_str(), path.as_str()) {
            ("GET", "verdicts.json") => {
                let reports = serde_json::to_vec(&*self.reports())?;
                respond(stream, 200, "application/json", &reports)
            }
            ("GET", path) => {
                let path = if path.is_empty() { "index.html" } else { path };
                match self.site.files.get(path) {
                    Some(content) => respond(stream, 200, content_type(path), content),
                    None => respond(stream, 404, "text/plain", format!("there is no {path}").as_bytes()),
                }
            }
            ("POST", path) => {
                let answer = self.report(path, body)?;
                respond(stream, 200, "application/json", &answer)
            }
            _ => bail!("method {method}; allowed: GET, POST"),
        }
    }

    fn reports(&self) -> std::sync::MutexGuard<'_, Reports> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, path: &str, body: Vec<u8>) -> Result<Vec<u8>> {
        let text = |body: &[u8]| String::from_utf8_lossy(body).into_owned();
        let event = match path.split('/').collect::<Vec<_>>()[..] {
            ["started"] => {
                let adapter = text(&body);
                *self.reports() = Reports { adapter: adapter.clone(), ..Reports::default() };
                Event::Started(adapter)
            }
            ["skipped"] => {
                let text = text(&body);
                let (device, lacks) =
                    text.split_once('\n').context("a device, and what is lacking on the next line")?;
                self.reports().skipped.push((device.into(), lacks.into()));
                Event::Skipped(device.into(), lacks.into())
            }
            ["failed"] => Event::Failed(text(&body)),
            ["finished"] => Event::Finished,
            ["runs", number, ref rest @ ..] => {
                let run = number.parse().ok().and_then(|k: usize| self.site.runs.get(k));
                let run = run.with_context(|| format!("run {number}; allowed: 0 … {}", self.site.runs.len() - 1))?;
                let verdict = judge(run, if rest == ["failed"] { Err(text(&body)) } else { Ok(&body) });
                let answer = serde_json::to_vec(&verdict)?;
                self.reports().verdicts.push(verdict.clone());
                self.events.send(Event::Judged(verdict))?;
                return Ok(answer);
            }
            _ => bail!("there is no {path} to report to"),
        };
        self.events.send(event)?;
        Ok(b"null".to_vec())
    }
}

/// One request; nothing from a connection that was closed unused.
fn read(stream: &TcpStream) -> Result<Option<Request>> {
    let mut reader = BufReader::new(stream);
    let mut line = || -> Result<String> {
        let mut line = String::new();
        reader.by_ref().take(MAX_LINE).read_line(&mut line)?;
        Ok(line.trim_end().into())
    };
    let first = line()?;
    if first.is_empty() {
        return Ok(None);
    }
    let (method, rest) = first.split_once(' ').context("a request line without a path")?;
    let path = rest.split([' ', '?']).next().unwrap_or_default().trim_start_matches('/');
    let mut length = 0;
    loop {
        let header = line()?;
        match header.split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse().with_context(|| format!("content-length{value}"))?;
            }
            Some(_) => {}
            None => break,
        }
    }
    if length > MAX_BODY {
        bail!("a body of {length} bytes; allowed: {MAX_BODY}");
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).context("a body shorter than its length")?;
    Ok(Some(Request { method: method.into(), path: path.into(), body }))
}

fn respond(mut stream: &TcpStream, status: u16, content_type: &str, content: &[u8]) -> Result<()> {
    let length = content.len();
    let head = format!(
        "HTTP/1.1 {status} \r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(content)?;
    Ok(())
}

fn content_type(path: &str) -> &'static str {
    match path.rsplit('.').next() {
        Some("html") => "text/html; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("json") => "application/json",
        Some("wgsl") => "text/plain; charset=utf-8",
        _ => "application/octet-stream",
    }
}
