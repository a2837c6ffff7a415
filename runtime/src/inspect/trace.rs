//! A container's start in the JSON of Chrome's trace events, which Perfetto and `chrome://tracing` show: complete events (`X`) in
//! microseconds, on one track for each who works on it.

use serde_json::{Value, json};

use crate::pod::{GuestTimes, Phase, Timeline};

/// Processes of the trace: the host, and the guest.
const HOST: u32 = 1;
const GUEST: u32 = 2;

/// Tracks.
const START: u32 = 1;
const MACHINE: u32 = 2;
const KERNEL: u32 = 3;
const AGENT: u32 = 4;
const CONTAINER: u32 = 5;

/// The trace of a container's start as far as it got.
pub fn json(container: &str, pod: &str, timeline: &Timeline) -> Value {
    let mut events = vec![meta("process_name", HOST, 0, "host"), meta("thread_name", HOST, START, "start")];
    let event = |process: u32, track: u32, name: &str, begin: u64, end: u64| {
        let since = |time: u64| time.saturating_sub(timeline.began) as f64 / 1000.0;
        let (from, to) = (since(begin), since(end.max(begin)));
        json!({ "ph": "X", "name": name, "cat": "start", "pid": process, "tid": track, "ts": from, "dur": to - from })
    };
    for span in timeline.spans() {
        events.push(event(HOST, START, span.phase.name(), span.begin, span.begin + span.length));
    }
    if let (Some(prepared), Some(built), Some(booted)) =
        (timeline.end_of(Phase::Prepare), timeline.end_of(Phase::Machine), timeline.end_of(Phase::Boot))
    {
        events.push(meta("thread_name", HOST, MACHINE, "virtual machine"));
        events.push(event(HOST, MACHINE, "build", prepared, built));
        events.push(event(HOST, MACHINE, "boot", built, booted));
    }
    if let Some(guest) = in_host_time(timeline) {
        events.push(meta("process_name", GUEST, 0, "guest"));
        for (track, name) in [(KERNEL, "kernel"), (AGENT, "agent"), (CONTAINER, "container")] {
            events.push(meta("thread_name", GUEST, track, name));
        }
        let [began, started, ready, called, made] = guest;
        events.push(event(GUEST, KERNEL, "kernel boots", began, started));
        events.push(event(GUEST, AGENT, "agent begins", started, ready));
        events.push(event(GUEST, AGENT, "waits for the pod", ready, called));
        events.push(event(GUEST, CONTAINER, "container is made", called, made));
        if let Some(start) = timeline.spans().find(|span| span.phase == Phase::Start) {
            events.push(event(GUEST, CONTAINER, "program is executed", start.begin, start.begin + start.length));
        }
    }
    json!({
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": { "container": container, "pod": pod, "podhull": crate::cli::VERSION },
    })
}

fn meta(what: &str, process: u32, track: u32, name: &str) -> Value {
    json!({ "ph": "M", "name": what, "pid": process, "tid": track, "args": { "name": name } })
}

/// What the guest says by its own clock, in the host's time: its kernel's beginning, and what comes after. Both clocks saw the agent
/// get ready. Nothing of it is before or after what it is a part of, whatever the guest says.
fn in_host_time(timeline: &Timeline) -> Option<[u64; 5]> {
    let GuestTimes { started, ready, called, made } = timeline.guest?;
    let (built, booted) = (timeline.end_of(Phase::Machine)?, timeline.end_of(Phase::Boot)?);
    let created = timeline.end_of(Phase::Create)?;
    let at =
        |time: u64| (i128::from(booted) + i128::from(time) - i128::from(ready)).clamp(0, i128::from(u64::MAX)) as u64;
    let (mut earliest, latest) = (built, created.max(built));
    Some([(0, booted), (started, booted), (ready, booted), (called, latest), (made, latest)].map(|(time, most)| {
        earliest = at(time).clamp(earliest, most.max(earliest));
        earliest
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(guest: GuestTimes) -> Timeline {
        let ends = [
            (Phase::Launch, 2_000),
            (Phase::Prepare, 5_000),
            (Phase::Machine, 9_000),
            (Phase::Boot, 50_000),
            (Phase::Hooks, 51_000),
            (Phase::Create, 70_000),
            (Phase::Start, 75_500),
        ];
        Timeline { began: 1_000, ends: ends.to_vec(), guest: Some(guest) }
    }

    #[test]
    fn events_of_the_start_come_one_after_the_other_and_are_the_whole() {
        let guest = GuestTimes { started: 30_000, ready: 38_000, called: 40_000, made: 55_000 };
        let trace = json("c", "p", &timeline(guest));
        let events = trace["traceEvents"].as_array().unwrap();
        let on = |track: u32| events.iter().filter(move |event| event["ph"] == "X" && event["tid"] == track);
        let mut end = 0.0;
        for event in on(START) {
            assert_eq!(event["ts"].as_f64().unwrap(), end, "{event}");
            end += event["dur"].as_f64().unwrap();
        }
        assert_eq!(end, 74.5);
        let kernel = on(KERNEL).next().unwrap();
        assert_eq!((kernel["ts"].as_f64(), kernel["dur"].as_f64()), (Some(11.0), Some(30.0)));
        let made = on(CONTAINER).next().unwrap();
        assert_eq!((made["ts"].as_f64(), made["dur"].as_f64()), (Some(51.0), Some(15.0)));
    }

    #[test]
    fn a_guest_that_lies_stays_within_its_part() {
        for guest in [
            GuestTimes { started: u64::MAX, ready: 0, called: 5, made: 1 },
            GuestTimes { started: 0, ready: u64::MAX, called: u64::MAX, made: 0 },
            GuestTimes::default(),
        ] {
            let [began, started, ready, called, made] = in_host_time(&timeline(guest)).unwrap();
            assert!(9_000 <= began && began <= started && started <= ready && ready <= 50_000, "{guest:?}");
            assert!(ready <= called && called <= made && made <= 70_000, "{guest:?}");
        }
    }
}
