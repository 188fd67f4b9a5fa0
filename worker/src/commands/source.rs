//! The arguments that name the student of a command.

use anyhow::ensure;
use clap::Args;
use tch::Device;

use crate::model::student::Student;

/// The arguments that name a student.
#[derive(Args)]
pub struct Source {
    /// An exported generator (a .safetensors file, or a folder in the layout of diffusers), or a run (STORAGE/runs/RUN,
    /// whose newest checkpoint is used), or one checkpoint of it (STORAGE/runs/RUN/checkpoints/ITERATION)
    #[arg(long, value_name = "URL")]
    checkpoint: String,
    /// Run only this many steps of the generator, from the first; by default all
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    steps: Option<u32>,
}

impl Source {
    /// Loads the student.
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
