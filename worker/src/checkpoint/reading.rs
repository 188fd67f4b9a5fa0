//! A shard of a checkpoint that comes in pieces: no more than a piece of it is in memory.

use anyhow::{Context, ensure};
use safetensors::tensor::{Metadata, TensorInfo};
use tch::{Kind, Tensor, no_grad};

/// Bytes of an element.
const ELEMENT: usize = size_of::<f32>();
/// Bytes before the header: its length.
const LENGTH: usize = 8;
/// The most that safetensors allows for a header.
const LONGEST_HEADER: usize = 100_000_000;

/// A range of the file that is wanted, and the place of its values.
pub struct Wanted {
    /// Bytes, from the first one of the data on.
    pub first: usize,
    /// Where they go: 1-D, fp32.
    pub place: Tensor,
}

impl Wanted {
    fn end(&self) -> usize {
        self.first + self.place.numel() * ELEMENT
    }
}

/// Reads one file. `plan` says what is wanted of its tensors, once they are known.
pub struct Reading<P> {
    plan: P,
    /// Bytes of the file.
    bytes: usize,
    /// What has come and is not used yet: the header, and then less than an element.
    rest: Vec<u8>,
    /// In the order of the file; those that are complete are gone.
    wanted: Option<Vec<Wanted>>,
    /// Where the rest begins in the data.
    at: usize,
}

impl<P: FnMut(&str, &TensorInfo) -> anyhow::Result<Vec<Wanted>>> Reading<P> {
    /// For a file of this many bytes.
    pub fn new(bytes: u64, plan: P) -> anyhow::Result<Self> {
        let bytes = usize::try_from(bytes).context("too large for this machine")?;
        Ok(Self { plan, bytes, rest: Vec::new(), wanted: None, at: 0 })
    }

    /// Takes the next piece.
    ///
    /// # Errors
    /// It is not a safetensors file, or the plan fails.
    pub fn take(&mut self, piece: &[u8]) -> anyhow::Result<()> {
        self.rest.extend_from_slice(piece);
        if self.wanted.is_none() && !self.read_header()? {
            return Ok(());
        }
        let Some(wanted) = &mut self.wanted else { return Ok(()) };
        let whole = self.rest.len() / ELEMENT * ELEMENT;
        let end = self.at + whole;
        for one in wanted.iter().take_while(|wanted| wanted.first < end) {
            let (from, to) = (self.at.max(one.first), end.min(one.end()));
            let values = &self.rest[from - self.at..to - self.at];
            let count = (values.len() / ELEMENT) as i64;
            let mut target = one.place.narrow(0, ((from - one.first) / ELEMENT) as i64, count);
            no_grad(|| target.copy_(&Tensor::from_data_size(values, &[count], Kind::Float)));
        }
        wanted.retain(|wanted| wanted.end() > end);
        self.rest.drain(..whole);
        self.at = end;
        Ok(())
    }

    /// Reads the header, if all of it is there.
    fn read_header(&mut self) -> anyhow::Result<bool> {
        let Some(length) = self.rest.first_chunk::<LENGTH>() else { return Ok(false) };
        let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
        ensure!(length <= LONGEST_HEADER.min(self.bytes), "its header cannot have {length} bytes");
        let start = LENGTH + length;
        let Some(header) = self.rest.get(LENGTH..start) else { return Ok(false) };
        let header: Metadata = serde_json::from_slice(header).context("its header cannot be read")?;
        let data = header.tensors().values().map(|info| info.data_offsets.1).max().unwrap_or(0);
        ensure!(
            start + data == self.bytes,
            "it has {} bytes, and its header says {}",
            self.bytes,
            start + data
        );
        let mut wanted = Vec::new();
        for (name, info) in header.tensors() {
            wanted.extend((self.plan)(&name, info)?);
        }
        wanted.retain(|wanted| wanted.place.numel() > 0);
        wanted.sort_by_key(|wanted| wanted.first);
        self.wanted = Some(wanted);
        self.rest.drain(..start);
        Ok(true)
    }

    /// After the last piece.
    ///
    /// # Errors
    /// The file ended in its header.
    pub fn finish(self) -> anyhow::Result<()> {
        ensure!(self.wanted.is_some(), "it ends in its header");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use safetensors::{Dtype, tensor::TensorView};
    use tch::Device;

    use super::*;

    fn file() -> Vec<u8> {
        let bytes = |values: std::ops::Range<u8>| -> Vec<u8> {
            values.flat_map(|value| f32::from(value).to_le_bytes()).collect()
        };
        let (a, b) = (bytes(0..12), bytes(20..25));
        let view = |shape: &[usize], data| TensorView::new(Dtype::F32, shape.to_vec(), data).unwrap();
        safetensors::serialize([("a", view(&[3, 4], &a)), ("b", view(&[5], &b))], None).unwrap()
    }

    fn read(file: &[u8], piece: usize, said: usize) -> anyhow::Result<Vec<Vec<f32>>> {
        // Elements 2 to 7 of `a`, 4 to 12 of `a`, and all of `b`.
        let places = [5, 8, 5].map(|count| Tensor::zeros([count], (Kind::Float, Device::Cpu)));
        let wanted = |first, place: &Tensor| Wanted { first, place: place.shallow_clone() };
        let plan = |name: &str, info: &TensorInfo| {
            let first = info.data_offsets.0;
            Ok(match name {
                "a" => vec![wanted(first + 16, &places[1]), wanted(first + 8, &places[0])],
                _ => vec![wanted(first, &places[2])],
            })
        };
        let mut reading = Reading::new(said as u64, plan)?;
        file.chunks(piece).try_for_each(|piece| reading.take(piece))?;
        reading.finish()?;
        Ok(places.iter().map(|place| Vec::try_from(place).unwrap()).collect())
    }

    #[test]
    fn the_size_of_the_pieces_makes_no_difference() {
        let file = file();
        for piece in [1, 3, 4, 7, 64, file.len()] {
            let found = read(&file, piece, file.len()).unwrap();
            assert_eq!(found[0], [2.0, 3.0, 4.0, 5.0, 6.0], "{piece}");
            assert_eq!(found[1], [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0], "{piece}");
            assert_eq!(found[2], [20.0, 21.0, 22.0, 23.0, 24.0], "{piece}");
        }
    }

    #[test]
    fn what_is_no_safetensors_file_is_an_error() {
        let file = file();
        let error = |file: &[u8], said| read(file, 16, said).unwrap_err().to_string();
        assert!(error(&file[..20], file.len()).contains("ends in its header"));
        assert!(error(&file, file.len() + 4).contains("its header says"));
        let mut long = file.clone();
        long[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(error(&long, long.len()).contains("its header cannot have"));
        let mut broken = file;
        broken[9] = b'?';
        assert!(error(&broken, broken.len()).contains("its header cannot be read"));
    }
}
