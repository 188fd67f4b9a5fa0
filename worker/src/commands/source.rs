//! The student that a command is about, as its arguments name it.

use anyhow::ensure;
use clap::Args;
use tch::Device;

use crate::model::student::Student;

/// Where the student comes from.
#[derive(Args)]
pub struct Source {
    /// An exported generator (a .safetensors file, or a folder in the layout of diffusers), or a run (STORAGE/runs/RUN, whose newest checkpoint it takes), or one
    /// checkpoint of it (STORAGE/runs/RUN/checkpoints/ITERATION)
    #[arg(long, value_name = "URL")]
    checkpoint: String,
    /// Run only the first so many steps of the generator; by default all
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    steps: Option<u32>,
}

impl Source {
    /// Loads it.
    ///
    /// # Errors
    /// There is no such file or checkpoint, it is damaged, or it has fewer steps than asked for.
    pub fn load(&self, device: Device) -> anyhow::Result<Student> {
        let mut student = Student::load(&self.checkpoint, device)?;
        if let Some(steps) = self.steps {
            ensure!(
                steps as usize <= student.times.len(),
                "{}: has {} step(s), at {:?}; --steps {steps} is more than it was trained for",
                student.origin,
                student.times.len(),
                student.times
            );
            student.times.truncate(steps as usize);
        }
        Ok(student)
    }
}
