//! The planned events, in order.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

/// Events by time; those of one moment in the order in which they were planned.
#[derive(Debug)]
pub struct Queue<T> {
    order: BinaryHeap<Reverse<(u64, u64)>>,
    planned: BTreeMap<u64, T>,
    sequence: u64,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { order: BinaryHeap::new(), planned: BTreeMap::new(), sequence: 0 }
    }
}

impl<T> Queue<T> {
    /// Plans an event for a moment.
    pub fn push(&mut self, at: u64, what: T) {
        self.order.push(Reverse((at, self.sequence)));
        self.planned.insert(self.sequence, what);
        self.sequence += 1;
    }

    /// The next event and its time.
    pub fn pop(&mut self) -> Option<(u64, T)> {
        let Reverse((at, sequence)) = self.order.pop()?;
        Some((at, self.planned.remove(&sequence)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soonest_comes_first_and_equals_in_the_order_in_which_they_were_planned() {
        let mut queue = Queue::default();
        for (at, what) in [(5, 'a'), (3, 'b'), (5, 'c'), (3, 'd')] {
            queue.push(at, what);
        }
        let order: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(order, [(3, 'b'), (3, 'd'), (5, 'a'), (5, 'c')]);
    }
}
