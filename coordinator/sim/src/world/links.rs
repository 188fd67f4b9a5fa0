//! Streams between workers and coordinators. Messages of one stream stay in order; those of different streams do not.

use potstill_core::{Event, StreamId};
use potstill_proto::message::ToWorker;

use super::{
    World,
    happening::{Happening, Up},
    parts::Link,
};

impl World {
    pub(super) fn connect(&mut self, coordinator: usize, process: usize) -> usize {
        let (up_until, down_until) = (self.now, self.now);
        self.links.push(Link {
            coordinator,
            process,
            broken: false,
            open: true,
            up: 0,
            down: 0,
            up_until,
            down_until,
        });
        self.links.len() - 1
    }

    fn delay(&mut self) -> u64 {
        let most = self.scenario.failure_millis / 2;
        let late = self.chance(if self.calm { 0.0 } else { self.scenario.faults.late });
        self.between(if late { (0, most) } else { self.scenario.link })
    }

    /// A worker sends a message.
    pub(super) fn send_up(&mut self, link: usize, what: Up) {
        let delay = self.delay();
        let now = self.now;
        let of = &mut self.links[link];
        if of.broken {
            return;
        }
        of.up_until = of.up_until.max(now + delay);
        of.up += 1;
        self.queue.push(of.up_until, Happening::Up { link, what });
    }

    /// A coordinator sends a message; `None` ends the stream.
    pub(super) fn send_down(&mut self, link: usize, message: Option<ToWorker>) {
        let delay = self.delay();
        let now = self.now;
        let of = &mut self.links[link];
        if of.broken {
            return;
        }
        of.down_until = of.down_until.max(now + delay);
        of.down += 1;
        self.queue.push(of.down_until, Happening::Down { link, message });
    }

    /// A message arrives at a coordinator.
    pub(super) fn arrives(&mut self, link: usize, what: Up) {
        let of = &mut self.links[link];
        of.up -= 1;
        if of.broken || !of.open {
            return;
        }
        let (coordinator, stream) = (of.coordinator, StreamId(link as u64));
        match what {
            Up::Hello(hello) => self.step(coordinator, Event::Attached { stream, hello }),
            Up::Message(message) => {
                let twice = self.chance(if self.calm { 0.0 } else { self.scenario.faults.twice });
                self.step(coordinator, Event::Received { stream, message: message.clone() });
                if twice && self.links[link].open {
                    self.step(coordinator, Event::Received { stream, message });
                }
            }
            Up::End => self.closed(link, "connection reset by peer"),
        }
    }

    /// A coordinator notices that a stream has ended.
    pub(super) fn closed(&mut self, link: usize, reason: &str) {
        let of = &mut self.links[link];
        if std::mem::take(&mut of.open) {
            let coordinator = of.coordinator;
            let event = Event::Closed { stream: StreamId(link as u64), reason: reason.to_owned() };
            self.step(coordinator, event);
        }
    }
}
